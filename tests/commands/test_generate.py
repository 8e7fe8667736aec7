"""`job generate`: the run's tuned model answers as it was trained, or there is one clear error."""

import io
import json
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from job import cli
from job.adapters.keras_format import load_adapter
from job.commands.generate import GenerateOptions, generate_answers
from job.evals.engine import Engine
from job.model.language_model import LanguageModel
from job.pipeline.layout import VALIDATION_EXAMPLES
from tests.commands.test_export import leave
from tests.conftest import MakeModel
from tests.conversations import turns
from tests.model.forward import full_logits

PROMPT = "I have a headache."
LIMIT = 6
DRAWN = 1000
Said = Callable[..., str]


@pytest.fixture(scope="module")
def model(make_model: MakeModel) -> LanguageModel:
    return make_model(rank=4, alpha=64)  # so large that other words are likely


@pytest.fixture(scope="module")
def run(model: LanguageModel, two_blocks: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose training is done."""
    folder = tmp_path_factory.mktemp("run")
    leave(folder, model, preset=two_blocks, chat_template="gemma")
    return folder


@pytest.fixture(scope="module")
def answer(run: Path, model: LanguageModel) -> Said:
    """What the engine says with the adapter's file, or without, after these turns."""
    engine = Engine(model, 2, 1024)  # one row takes longer to compile
    tuned = model.merged_weights(*load_adapter(run / "adapter/adapter.lora.h5", model.lora))

    def say(
        *texts: str,
        system: str | None = None,
        base: bool = False,
    ) -> str:
        tokens, _ = engine.encode([turns(*texts, system=system)])
        weights = model.weights if base else tuned
        (answer,) = engine.generate(weights, tokens, LIMIT, "test")
        return engine.reply(answer, tokens[0]).answer or ""

    return say


@pytest.fixture
def generated(run: Path, capsys: pytest.CaptureFixture[str]) -> Callable[..., dict[str, str]]:
    """Runs the command; its one answer."""

    def generate(**options: object) -> dict[str, str]:
        wanted = GenerateOptions(**({"max_new_tokens": LIMIT, "as_json": True} | options))  # type: ignore[arg-type]
        generate_answers(str(run), wanted, [PROMPT])
        said = json.loads(capsys.readouterr().out)
        return {name: said[name]["text"] for name in ("tuned", "base") if name in said}

    return generate


def test_the_tuned_model_answers_and_the_base_beside_it(
    generated: Callable[..., dict[str, str]], answer: Said
) -> None:
    found = generated(base=True)
    assert found == {"tuned": answer(PROMPT), "base": answer(PROMPT, base=True)}
    assert found["tuned"] != found["base"]


@pytest.mark.slow
def test_drawn_answers_follow_the_seed(generated: Callable[..., dict[str, str]]) -> None:
    greedy = generated()
    first = generated(seed=1)
    assert first == generated(seed=1, temperature=1.0)
    assert first["tuned"] not in (generated(seed=2)["tuned"], greedy["tuned"])


def test_a_conversation_goes_on_until_it_is_begun_anew(
    run: Path,
    answer: Said,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    said = io.StringIO(f"{PROMPT}\n\nSince yesterday.\n/new\nSince yesterday.\n/quit\nmore\n")
    monkeypatch.setattr(sys, "stdin", said)
    generate_answers(str(run), GenerateOptions(LIMIT, as_json=True))
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    first = answer(PROMPT)
    expected = [first, answer(PROMPT, first, "Since yesterday."), answer("Since yesterday.")]
    assert [line["tuned"]["text"] for line in found] == expected
    assert [line["prompt"] for line in found] == [PROMPT, "Since yesterday.", "Since yesterday."]


def test_several_prompts_are_answered_each_alone(
    run: Path, answer: Said, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--json", "--max-new-tokens", str(LIMIT)]
    prompts = ["--prompt", PROMPT, "--prompt", "Since yesterday."]
    monkeypatch.setattr(sys, "argv", ["job", "generate", str(run), *options, *prompts])
    assert cli.main() == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [set(line) for line in lines] == [{"prompt", "system", "tuned"}] * 2
    assert [line["prompt"] for line in lines] == [PROMPT, "Since yesterday."]
    assert [line["tuned"]["text"] for line in lines] == [answer(PROMPT), answer("Since yesterday.")]


def test_thoughts_and_terminal_codes_are_told_from_the_answer(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(
        "job.chat.tokenizer.ChatTokenizer.decode",
        lambda codec, tokens: "<think>Hm.</think> Re\x1b[2Jst.\nNow.",
    )
    generate_answers(str(run), GenerateOptions(LIMIT, as_json=True), [PROMPT])
    tuned = json.loads(capsys.readouterr().out)["tuned"]
    assert (tuned["text"], tuned["thoughts"]) == ("Re\x1b[2Jst.\nNow.", "Hm.")
    generate_answers(str(run), GenerateOptions(LIMIT), [PROMPT])
    assert capsys.readouterr().out == "Re\u2039U+001B\u203a[2Jst.\nNow.\n"


def held_out(run: Path, *systems: str) -> None:
    """Leave held-out examples with these instructions."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"id": str(n), "system": system, "prompt": "a", "response": "b", "history": []}
        for n, system in enumerate(systems)
    ]
    path = run / VALIDATION_EXAMPLES
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)


def test_the_instruction_is_that_of_the_training_examples(
    run: Path, answer: Said, capsys: pytest.CaptureFixture[str]
) -> None:
    def tuned(**options: str) -> tuple[str, str | None]:
        generate_answers(str(run), GenerateOptions(LIMIT, as_json=True, **options), [PROMPT])  # type: ignore[arg-type]
        said = json.loads(capsys.readouterr().out)
        return said["tuned"]["text"], said["system"]

    try:
        held_out(run, "Be brief.", "Be brief.")
        assert tuned() == (answer(PROMPT, system="Be brief."), "Be brief.")
        assert tuned(system="Be kind.") == (answer(PROMPT, system="Be kind."), "Be kind.")
        held_out(run, "Be brief.", "Be long.")
        assert tuned() == (answer(PROMPT), None)
    finally:
        (run / VALIDATION_EXAMPLES).unlink()


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--prompt", " "], 2, "the prompt is empty"),
        (["--prompt", "a", "--prompt", ""], 2, "the prompt is empty"),
        (["--prompt", "a", "--temperature", "0"], 2, "--temperature 0.0: write a number above 0"),
        (["--prompt", "a"], 2, "has no adapter"),
    ],
)
def test_wrong_arguments_end_in_one_line(
    options: list[str],
    code: int,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "spec.yaml").write_text("name: t\n")
    monkeypatch.setattr(sys, "argv", ["job", "generate", str(tmp_path), *options])
    ended = cli.main()
    out, err = capsys.readouterr()
    assert (ended, out, err.count("\n")) == (code, "", 1)
    assert message in err


@pytest.mark.parametrize(
    ("option", "value"), [("--seed", "-1"), ("--seed", str(2**31)), ("--max-new-tokens", "0")]
)
def test_a_number_out_of_range_is_refused(
    option: str, value: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["job", "generate", "none", option, value])
    assert cli.main() == 2
    out, err = capsys.readouterr()
    assert (out, f"Error: Invalid value for '{option}'" in err) == ("", True)


def test_a_damaged_adapter_is_refused(
    model: LanguageModel,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    leave(tmp_path / "run", model)
    path = tmp_path / "run/adapter/adapter.lora.h5"
    path.write_bytes(path.read_bytes()[:-100])
    monkeypatch.setattr(sys, "argv", ["job", "generate", str(tmp_path / "run"), "--prompt", "a"])
    assert cli.main() == 4
    assert "does not have the checksum in adapter.json" in capsys.readouterr().err


def drawn(model: LanguageModel, **options: float) -> np.ndarray:
    """The first tokens of many answers to one prompt."""
    from job.model.generation import Sampling

    engine = Engine(model, DRAWN, 1024)
    (tokens,), _ = engine.encode([PROMPT])
    sampling = Sampling(**options)  # type: ignore[arg-type]
    rows = engine.generate_program(
        model.weights,
        np.array([tokens] * DRAWN, np.int32),
        np.full(DRAWN, len(tokens), np.int32),
        limit=1,
        sampler=sampling.sampler(),
        state=sampling.state(0),
    )
    return np.asarray(rows)[:, 0]


def probabilities(model: LanguageModel, temperature: float = 1.0) -> np.ndarray:
    tokens, _ = Engine(model, 1, 1024).encode([PROMPT])
    ids = np.array(tokens, np.int32)
    logits = full_logits(model, model.weights, ids)[0, -1] / temperature
    scores = np.exp(logits - logits.max())
    return scores / scores.sum()


@pytest.mark.slow
def test_tokens_are_drawn_as_often_as_they_are_likely(model: LanguageModel) -> None:
    expected = probabilities(model, 0.5)
    found = np.bincount(drawn(model, temperature=0.5), minlength=len(expected)) / DRAWN
    likely = np.argsort(expected)[-5:]
    error = np.sqrt(expected * (1 - expected) / DRAWN)
    assert np.all(np.abs(found - expected)[likely] < 5 * error[likely])
    assert expected[likely].max() > 0.002
    assert len(np.unique(drawn(model))) > len(np.unique(drawn(model, temperature=0.2)))


@pytest.mark.slow
def test_both_loops_draw_by_the_seed_alone(model: LanguageModel) -> None:
    from job.model.generation import SamplerState, Sampling

    (tokens,), _ = Engine(model, 1, 1024).encode([PROMPT])
    ids, lengths = np.array([tokens], np.int32), np.array([len(tokens)], np.int32)
    for answers in (model.generate, model.generate_with_kerashub):

        def said(sampling: Sampling | None, answers: Callable[..., object] = answers) -> list[int]:
            sampler = sampling and sampling.sampler()
            drawn = sampling and SamplerState(sampler, jax.numpy.asarray(sampling.state(0)))
            found = answers(model.weights, ids, lengths, 6, model.tokenizer.stop_ids, drawn)
            return list(np.asarray(found)[0])

        assert said(Sampling(seed=1)) == said(Sampling(seed=1)) != said(Sampling(seed=2))
        assert said(Sampling(temperature=1e-6)) == said(None)
