"""The reference stage counts nothing as wrong, pays for nothing twice, and keeps the key secret."""

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from job.errors import RunStoppedError
from job.evals.api_client import API_KEY_VARIABLE
from job.evals.metrics import score_choices, score_dialogues
from job.evals.overlap import overlap_scores
from job.evals.paired import compare_means
from job.evals.predictions import ChoiceLine, DialogueLine, Line, SideLine, scores_by_id
from job.evals.statistics import Bootstrap
from job.pipeline import layout
from job.pipeline.stages import has_more_to_do
from job.scores import MeanComparison
from job.storage.base import Store
from job.storage.local import LocalStore
from job.storage.locations import open_store
from tests.pipeline.kills import kill_while_it_waits
from tests.pipeline.reference_runs import (
    ALL,
    DIALOGUES,
    QUESTIONS,
    run_data_stage,
    run_of,
    run_reference_stage,
    spec_of,
)
from tests.services.openrouter import PRICE, Chat, Misbehaviour, OpenRouter

REPLIES, PARTIAL_REPLIES = layout.replies("reference")
SECRET = "sk-or-v1-" + "0123456789abcdef" * 4


@pytest.fixture(scope="module")
def staged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run after its data stage."""
    folder = tmp_path_factory.mktemp("staged")
    run_data_stage(LocalStore(folder / "runs/r"), str(folder / "runs"))
    return folder / "runs/r"


@pytest.fixture
def store(staged: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> LocalStore:
    monkeypatch.setenv(API_KEY_VARIABLE, SECRET)
    shutil.copytree(staged, tmp_path / "r")
    return LocalStore(tmp_path / "r")


@pytest.fixture(params=["folder", "bucket"])
def any_store(request: pytest.FixtureRequest, store: LocalStore) -> Store:
    if request.param == "folder":
        return store
    request.getfixturevalue("bucket")
    remote = open_store("gs://runs/team/r")
    for key in store.list("data/"):
        remote.write(key, store.read(key) or b"")
    return remote


def right(chat: Chat) -> str:
    """Return the right letter for every sample question, and words for other prompts."""
    text = chat["messages"][-1]["content"]
    return GOLD[text.split("\n")[0]] if "Answer with the letter" in text else "Drink water."


def _gold() -> dict[str, str]:
    from job.evals.tasks import load_task

    (entry,) = spec_of("http://localhost").evals.multiple_choice
    return {q.text.split("\n")[0]: q.gold for q in load_task(entry).questions}


GOLD = _gold()


@pytest.fixture
def service() -> Iterator[OpenRouter]:
    with OpenRouter(answer=right, key=SECRET) as running:
        yield running


def url(service: OpenRouter) -> str:
    return f"{service.url}/api/v1"


def lines[L: Line](store: Store, name: str, kind: type[L]) -> list[L]:
    content = store.read(f"evals/reference/{name}/predictions.jsonl")
    assert content is not None
    return [kind.model_validate_json(line) for line in content.decode().split("\n") if line]


FAILURES: list[Misbehaviour] = [
    "error", "choice_error", "finish_error", "no_choices", "length", "429", "502",
]  # fmt: skip


def test_every_answer_has_its_provider_and_the_billed_cost(
    store: LocalStore, service: OpenRouter
) -> None:
    outcome = run_reference_stage(store, spec_of(url(service)))
    questions = lines(store, "questions", ChoiceLine)
    assert score_choices(questions).correct == len(questions) == QUESTIONS
    assert {(line.provider, line.model) for line in questions} == {("Stand-in", "org/model")}
    result = outcome.result
    assert (result.status, result.requests, result.failed, result.lost) == ("complete", ALL, 0, 0)
    assert result.cost_usd == pytest.approx(service.billed, abs=1e-6)
    assert result.cost_usd > ALL * PRICE
    assert not outcome.open
    assert store.list(PARTIAL_REPLIES) == []
    assert all(chat["provider"] == {"require_parameters": True} for chat in service.chats)
    assert all(chat["reasoning"] == {"effort": "none"} for chat in service.chats)


def test_thoughts_of_the_reference_are_kept_and_not_scored(
    store: LocalStore, service: OpenRouter
) -> None:
    service.answer = lambda chat: f"<think>The answer is E.</think>{right(chat)}"
    run_reference_stage(store, spec_of(url(service)))
    questions = lines(store, "questions", ChoiceLine)
    assert score_choices(questions).correct == QUESTIONS
    dialogues = lines(store, "dialogue", DialogueLine)
    sides = lines(store, "side_by_side", SideLine)
    assert {line.thoughts for line in [*questions, *dialogues, *sides]} == {"The answer is E."}
    assert {line.answer for line in [*dialogues, *sides]} == {"Drink water."}


@pytest.mark.parametrize("name", [*FAILURES, "cut", "402"])
def test_a_failure_is_missing_and_not_wrong(
    name: Misbehaviour, store: LocalStore, service: OpenRouter
) -> None:
    service.misbehave = lambda chat: name if len(service.chats) % 3 == 2 else "ok"
    outcome = run_reference_stage(store, spec_of(url(service)))
    questions = lines(store, "questions", ChoiceLine)
    scored = score_choices(questions)
    assert scored.correct == QUESTIONS - scored.missing
    assert (scored.accuracy, scored.unparsed) == (1.0, 0)
    assert 0 < scored.missing == sum(line.error is not None for line in questions)
    held_out = lines(store, "dialogue", DialogueLine)
    rouge = score_dialogues(held_out, Bootstrap(100, 0)) if name != "402" else None
    assert rouge is None or rouge.missing == sum(line.error is not None for line in held_out)
    result = outcome.result
    failed = sum(line.error is not None for line in [*questions, *held_out])
    failed += sum(line.error is not None for line in lines(store, "side_by_side", SideLine))
    assert (result.failed, result.status) == (failed, "partial")
    if name == "cut":
        assert result.lost == failed
        assert result.cost_usd < service.billed
    else:
        assert result.lost == 0
        assert result.cost_usd == pytest.approx(service.billed, abs=1e-6)
    assert outcome.open == (name != "length")


def test_the_next_start_requests_only_missing_answers(
    any_store: Store, service: OpenRouter
) -> None:
    service.script.extend(["ok", "502", "no_choices", "ok", "length", "error"])
    first = run_reference_stage(any_store, spec_of(url(service)))
    assert (first.result.requests, first.result.failed, len(service.chats)) == (ALL, 4, ALL)
    second = run_reference_stage(any_store, spec_of(url(service)))
    assert len(service.chats) == ALL + 3
    result = second.result
    assert (result.requests, result.failed, result.status) == (ALL + 3, 1, "partial")
    assert not second.open
    assert result.cost_usd == pytest.approx(service.billed, abs=1e-6)
    assert run_reference_stage(any_store, spec_of(url(service))).result == result
    assert len(service.chats) == ALL + 3
    run_reference_stage(any_store, spec_of(url(service), model="org/other"))
    assert len(service.chats) == 2 * ALL + 3


def test_a_stop_saves_the_answers(any_store: Store, service: OpenRouter) -> None:
    spec = spec_of(url(service))
    with tempfile.TemporaryDirectory() as work:
        run = run_of(any_store, spec, Path(work))

        def stop_at_the_tenth(chat: Chat) -> str:
            if len(service.chats) == 10:
                run.stop.requested = "SIGTERM"
            return right(chat)

        service.answer = stop_at_the_tenth
        with pytest.raises(RunStoppedError):
            run_reference_stage(any_store, spec, run)
    sent = len(service.chats)
    assert 10 <= sent < ALL
    assert any_store.read("evals/reference/questions/predictions.jsonl") is None
    service.answer = right
    outcome = run_reference_stage(any_store, spec)
    assert len(service.chats) == ALL
    assert (outcome.result.requests, outcome.result.status) == (ALL, "complete")
    assert any_store.list(PARTIAL_REPLIES) == []


@pytest.mark.slow
def test_after_kills_only_missing_answers_are_requested(
    store: LocalStore, service: OpenRouter
) -> None:
    output = kill_while_it_waits("reference", store, service, 9, SECRET)
    under_way = len(service.chats) - 9
    assert store.read(REPLIES) is None
    service.script.extend(["502"] * 5)
    first = run_reference_stage(store, spec_of(url(service)))
    assert len(service.chats) == ALL + under_way
    assert (first.result.requests, first.result.failed) == (ALL, 5)

    output += kill_while_it_waits("reference", store, service, 2, SECRET)
    again = len(service.chats)
    outcome = run_reference_stage(store, spec_of(url(service)))
    assert len(service.chats) - again == 3
    assert (outcome.result.requests, outcome.result.status) == (ALL + 5, "complete")
    assert score_choices(lines(store, "questions", ChoiceLine)).correct == QUESTIONS

    assert SECRET not in output
    for key in store.list():
        assert SECRET.encode() not in (store.read(key) or b"")
    assert SECRET not in repr(service.chats)


def test_the_budget_stops_requests_and_a_larger_one_resumes(
    store: LocalStore, service: OpenRouter
) -> None:
    service.misbehave = lambda chat: "dear"
    spec = spec_of(url(service), max_usd=0.5)
    outcome = run_reference_stage(store, spec)
    result = outcome.result
    assert 0.25 < result.cost_usd <= 0.5
    assert result.cost_usd == pytest.approx(service.billed, abs=1e-6)
    assert result.status == "partial"
    assert "the budget of 0.5 USD is used up; raise reference.max_usd" in (result.reason or "")
    assert result.requests == len(service.chats) < ALL
    assert score_choices(lines(store, "questions", ChoiceLine)).accuracy == 1.0

    outcome = outcome.model_dump(mode="json")
    assert spec.reference is not None
    assert not has_more_to_do(outcome, spec.reference)
    for larger in (100.0, None):
        more = spec_of(url(service), max_usd=larger)
        assert more.reference is not None
        assert has_more_to_do(outcome, more.reference)
    rest = run_reference_stage(store, spec_of(url(service), max_usd=100.0))
    assert len(service.chats) == ALL
    assert (rest.result.requests, rest.result.status) == (ALL, "complete")


def test_a_budget_without_prices_stops_after_one_request(
    store: LocalStore, service: OpenRouter
) -> None:
    service.misbehave = lambda chat: "no_cost"
    result = run_reference_stage(store, spec_of(url(service), max_usd=1.0)).result
    assert (len(service.chats), result.failed) == (1, ALL - 1)
    assert "remove it" in (result.reason or "")
    assert run_reference_stage(store, spec_of(url(service))).result.status == "complete"


def test_dialogues_have_the_limit_of_the_other_models(
    store: LocalStore, service: OpenRouter
) -> None:
    run_reference_stage(store, spec_of(url(service)))
    held_out = lines(store, "dialogue", DialogueLine)
    assert len(held_out) == DIALOGUES
    assert {(line.answer, line.tokens, line.finish) for line in held_out} == {
        ("Drink water.", 2, "stop")
    }
    assert [line.rougeL for line in held_out] == [
        overlap_scores(line.expected, line.answer)["rougeL"] for line in held_out
    ]
    limits = [chat["max_tokens"] for chat in service.chats]
    assert (limits.count(48), limits.count(1024)) == (DIALOGUES, ALL - DIALOGUES)
    failed = held_out[0].model_copy(update={"error": "HTTP 502", "rougeL": 0.0})
    answers = [failed, *held_out[1:]]
    before, after = scores_by_id(held_out), scores_by_id(answers)
    comparison = compare_means(
        MeanComparison, ("a", "b"), before, after, Bootstrap(100, 0), "primary"
    )
    assert comparison is not None
    assert (comparison.examples, comparison.difference) == (DIALOGUES - 1, 0.0)
