"""`job generate`: a run's tuned model answers, and the model without the adapter beside it.

The model is that of the run: the same commit, the same chat template, the prompt as the spec
wraps it, the instruction that it was trained with, and the adapter's file, checked.
"""

import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.adapters.keras_format import H5, check_model
from job.adapters.locate import TrainedRun
from job.chat.conversation import Message
from job.errors import UsageError
from job.machine import devices
from job.pipeline.data_stage import VALIDATION, iter_examples
from job.report.page import legible
from job.runtime import logs
from job.runtime.signals import STOP
from job.spec.fields import template_fields
from job.spec.schema import Mesh, Runtime

if TYPE_CHECKING:
    from job.evals.engine import Engine, Generation
    from job.model.generation import Sampling
    from job.model.lora import Weights


_NEW, _QUIT = "/new", "/quit"


@dataclass(frozen=True)
class GenerateOptions:
    """The options of the command."""

    max_new_tokens: int = 256
    base: bool = False
    system: str | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    seed: int | None = None
    as_json: bool = False

    def check(self) -> None:
        """Raise UsageError where an option has no sense."""
        problems = (
            (self.max_new_tokens < 1, f"--max-new-tokens {self.max_new_tokens}: write 1 or more"),
            (
                self.temperature is not None and not 0 < self.temperature < 1e3,
                f"--temperature {self.temperature}: write a number above 0, or leave it out for "
                "greedy decoding",
            ),
            (
                self.top_p is not None and not 0 < self.top_p <= 1,
                f"--top-p {self.top_p}: write a share above 0, up to 1",
            ),
            (self.top_k is not None and self.top_k < 1, f"--top-k {self.top_k}: write 1 or more"),
            (
                self.seed is not None and not 0 <= self.seed < 2**31,
                f"--seed {self.seed}: write a number from 0 to 2147483647",
            ),
        )
        for wrong, message in problems:
            if wrong:
                raise UsageError(message)

    def sampling(self, turn: int) -> "Sampling | None":
        """How the answer of a turn is drawn; None for greedy decoding."""
        from job.model.generation import Sampling

        if all(v is None for v in (self.temperature, self.top_p, self.top_k, self.seed)):
            return None
        return Sampling(
            1.0 if self.temperature is None else self.temperature,
            1.0 if self.top_p is None else self.top_p,
            self.top_k,
            (self.seed or 0) + turn,
        )


def generate_answers(
    uri: str, wanted: GenerateOptions, prompt: str | None = None, prompt_file: str | None = None
) -> None:
    """Answer one prompt, or each line of a conversation on standard input.

    Raises:
        UsageError: the arguments are wrong, or the run has no adapter.
        StageError: files of the run or of the model are missing or damaged.
    """
    wanted.check()
    text = _prompt(prompt, prompt_file)
    logs.configure(logs.RunLog(), sys.stderr, least=logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="job-") as work:
        run = TrainedRun(uri, Path(work), "job generate")
        models = _load(run, wanted)
        system = wanted.system
        if system is None:
            system = _trained_system(run, Path(work))
        conversation = _Conversation(models, wanted, system, _wrapping(run.spec.data.prompt))
        if text is not None:
            conversation.say(text)
            return
        with contextlib.suppress(KeyboardInterrupt), STOP.interactive():
            for said in _lines_said():
                if said == _NEW:
                    conversation.begin()
                else:
                    conversation.say(said)


def _prompt(prompt: str | None, prompt_file: str | None) -> str | None:
    if prompt is not None and prompt_file is not None:
        raise UsageError("--prompt and --prompt-file are two prompts; write one of them")
    if prompt_file == "-":
        prompt = sys.stdin.read()
    elif prompt_file is not None:
        try:
            prompt = Path(prompt_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
            raise UsageError(f"--prompt-file {prompt_file}: {reason}") from None
    if prompt is not None and not prompt.strip():
        raise UsageError("the prompt is empty; write what to say")
    return prompt


def _lines_said() -> Iterator[str]:
    """What the user says, a line a turn."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        import readline  # noqa: F401 - editing of the line

        sys.stderr.write(f"{_NEW} begins another conversation, {_QUIT} ends.\n")
    while True:
        try:
            said = input("> ") if on_terminal else input()
        except EOFError:
            return
        if said.strip() == _QUIT:
            return
        if said.strip():
            yield said.strip()


@dataclass(frozen=True)
class _Models:
    """The weights that answer, by name, and what they answer with."""

    engine: "Engine"
    weights: dict[str, "Weights"]


def _load(run: TrainedRun, wanted: GenerateOptions) -> _Models:
    """The tuned model, and the base where it is wanted, on the devices of this machine."""
    devices.start_on_any_device()
    import jax

    from job.adapters.keras_format import load_adapter
    from job.evals.engine import Engine
    from job.model.load import load_model

    split = run.spec.runtime.mesh.model
    split = split if split <= len(jax.devices()) else 1
    mesh = devices.make_mesh(Runtime(mesh=Mesh(data=1, model=split)))
    path = run.file(H5)
    model = load_model(run.spec.model, run.spec.seed, mesh, run.revisions)
    check_model(run.info, run.spec.model.preset, model.family, "job generate")
    weights = {"tuned": model.merged_weights(*load_adapter(path, model.lora))}
    if wanted.base:
        weights = {"base": model.weights} | weights
    return _Models(Engine(model, 1, run.spec.evals.max_prompt_tokens), weights)


def _trained_system(run: TrainedRun, work: Path) -> str | None:
    """The instruction of the training examples, where all have the same."""
    given = run.spec.data.system
    if given is not None and not template_fields(given):
        return given
    path = work / "validation.parquet"
    if not run.store.download(VALIDATION, path):
        return None
    found = {example.system for example in iter_examples(path)}
    if len(found) > 1:
        logs.get().warning("the examples have different instructions: give one with --system")
        return None
    return next(iter(found), None)


def _wrapping(template: str | None) -> Callable[[str], str]:
    """The user's words as training saw them: in the spec's template, where it has one place."""
    fields = template_fields(template) if template else []
    if template is None or len(fields) != 1:
        return lambda said: said
    return lambda said: template.format(**{fields[0]: said})


@dataclass
class _Conversation:
    """Turns, each model's own."""

    models: _Models
    wanted: GenerateOptions
    system: str | None
    wrap: Callable[[str], str]
    turns: dict[str, list[Message]] = field(default_factory=dict)
    said: int = 0

    def begin(self) -> None:
        """Forget what was said."""
        self.turns = {}

    def say(self, text: str) -> None:
        """Have every model answer, and print the answers."""
        prompt = Message("user", self.wrap(text))
        answers = {}
        for name in self.models.weights:
            turns = self.turns.setdefault(name, [])
            turns.append(prompt)
            answers[name] = self._answer(name, turns)
            turns.append(Message("assistant", answers[name].text))
        self.said += 1
        self._print(text, answers)

    def _answer(self, name: str, turns: list[Message]) -> "Generation":
        engine = self.models.engine
        system = [Message("system", self.system)] if self.system else []
        tokens, cut = engine.encode([[*system, *turns]])
        if cut:
            logs.get().warning(
                "the conversation is longer than evals.max_prompt_tokens: its beginning is left "
                f"out; {_NEW} begins another"
            )
        (answer,) = engine.generate(
            self.models.weights[name],
            tokens,
            self.wanted.max_new_tokens,
            name,
            sampling=self.wanted.sampling(self.said),
        )
        return answer

    def _print(self, said: str, answers: "dict[str, Generation]") -> None:
        if self.wanted.as_json:
            document: dict[str, Any] = {"prompt": said, "system": self.system}
            for name, answer in answers.items():
                document[name] = {
                    "text": answer.text, "tokens": answer.tokens, "finish": answer.finish,
                }  # fmt: skip
            sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
        else:
            for name, answer in answers.items():
                heading = f"[{name}]\n" if len(answers) > 1 else ""
                # A model's answer may hold what a terminal takes for commands.
                sys.stdout.write(f"{heading}{legible(answer.text)}\n")
        sys.stdout.flush()
