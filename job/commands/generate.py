"""`job generate`: answers of a run's fine-tuned model and, on request, of its base model.

Model commit, chat template, prompt template and system prompt are those of training, and the
adapter's checksum is verified.
"""

import contextlib
import json
import logging
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from job.adapters.keras_format import H5, check_model
from job.chat.conversation import Message
from job.commands.trained_run import TrainedRun
from job.errors import UsageError
from job.machine import devices
from job.pipeline.layout import VALIDATION_EXAMPLES
from job.runtime import logs
from job.runtime.logs import legible
from job.runtime.signals import STOP
from job.spec.fields import fill_template, template_fields
from job.spec.schema import Mesh, Runtime

if TYPE_CHECKING:
    from job.evals.engine import Engine
    from job.evals.predictions import Reply
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
    seed: int | None = None
    as_json: bool = False

    def sampling(self, turn: int) -> "Sampling | None":
        """Return the sampling of a turn's answer; None for greedy decoding."""
        from job.model.generation import Sampling

        if self.temperature is None and self.seed is None:
            return None
        temperature = 1.0 if self.temperature is None else self.temperature
        return Sampling(temperature, (self.seed or 0) + turn)


def generate_answers(uri: str, options: GenerateOptions, prompts: Sequence[str] = ()) -> None:
    """Answer prompts, each alone, or each line of a conversation from standard input.

    Raises:
        UsageError: the arguments are wrong, or the run has no adapter.
        StageError: files of the run or of the model are missing or damaged.
    """
    if options.temperature is not None and not 0 < options.temperature < 1e3:
        raise UsageError(
            f"--temperature {options.temperature}: write a number above 0, or leave it out for "
            "greedy decoding"
        )
    if not all(prompt.strip() for prompt in prompts):
        raise UsageError("the prompt is empty; write one")
    logs.configure(None, sys.stderr, least=logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="job-") as work:
        run = TrainedRun(uri, Path(work), "job generate")
        engine, weights = _load(run, options)
        system = options.system
        if system is None:
            system = _training_system_prompt(run, Path(work))
        template = _prompt_template(run.spec.data.prompt)
        conversation = _Conversation(engine, weights, options, system, template)
        if prompts:
            for prompt in prompts:
                conversation.reset()
                conversation.answer(prompt)
            return
        with contextlib.suppress(KeyboardInterrupt), STOP.interactive():
            for line in _input_lines():
                if line == _NEW:
                    conversation.reset()
                else:
                    conversation.answer(line)


def _input_lines() -> Iterator[str]:
    """Yield the lines of standard input that are not empty, until /quit."""
    on_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if on_terminal:
        import readline  # noqa: F401 - line editing

        sys.stderr.write(f"{_NEW} starts a new conversation, {_QUIT} ends.\n")
    while True:
        try:
            line = (input("> ") if on_terminal else input()).strip()
        except EOFError:
            return
        if line == _QUIT:
            return
        if line:
            yield line


def _load(run: TrainedRun, options: GenerateOptions) -> "tuple[Engine, dict[str, Weights]]":
    """Load an engine, and the weights of the fine-tuned model and, if requested, the base."""
    devices.configure_cache(Runtime())
    import jax

    from job.adapters.keras_format import load_adapter
    from job.evals.engine import Engine
    from job.model.load import load_model

    shards = run.spec.runtime.mesh.model
    shards = shards if shards <= len(jax.devices()) else 1
    mesh = devices.make_mesh(Runtime(mesh=Mesh(data=1, model=shards)))
    path = run.file(H5)
    model = load_model(run.model(), run.spec.seed, mesh, run.revisions)
    check_model(run.info, run.spec.model.preset, model.family, "job generate")
    weights = {"tuned": model.merged_weights(*load_adapter(path, model.lora))}
    if options.base:
        weights = {"base": model.weights} | weights
    return Engine(model, 2, run.spec.evals.max_prompt_tokens), weights


def _training_system_prompt(run: TrainedRun, work: Path) -> str | None:
    """Return the system prompt of the training data, if all examples have the same."""
    system = run.spec.data.system
    if system is not None and not template_fields(system):
        return system
    path = work / "validation.parquet"
    if not run.store.download(VALIDATION_EXAMPLES, path):
        return None
    import pyarrow.parquet as pq

    prompts = set(pq.read_table(path, columns=["system"])["system"].to_pylist())
    if len(prompts) > 1:
        logs.get().warning("examples have different system prompts; set one with --system")
        return None
    return next(iter(prompts), None)


def _prompt_template(template: str | None) -> Callable[[str], str]:
    """Return a function that formats a prompt as in training, if the template has one field."""
    fields = template_fields(template) if template else []
    if template is None or len(fields) != 1:
        return lambda text: text
    return lambda text: fill_template(template, [text])


@dataclass
class _Conversation:
    """A conversation with each model, which all get the same prompts."""

    engine: "Engine"
    weights: "dict[str, Weights]"
    options: GenerateOptions
    system: str | None
    format_prompt: Callable[[str], str]
    turns: dict[str, list[Message]] = field(default_factory=dict)
    count: int = 0
    """Prompts so far, in all conversations."""

    def reset(self) -> None:
        """Start a new conversation."""
        self.turns = {}

    def answer(self, text: str) -> None:
        """Generate and print the answer of every model to a prompt."""
        prompt = Message("user", self.format_prompt(text))
        system = [Message("system", self.system)] if self.system else []
        answers = {}
        for name, weights in self.weights.items():
            turns = self.turns.setdefault(name, [])
            turns.append(prompt)
            tokens, truncated = self.engine.encode([[*system, *turns]])
            if truncated:
                logs.get().warning(
                    "conversation exceeds evals.max_prompt_tokens: its beginning is dropped; "
                    f"{_NEW} starts a new one"
                )
            sampling, most = self.options.sampling(self.count), self.options.max_new_tokens
            (answer,) = self.engine.generate(weights, tokens, most, name, sampling=sampling)
            reply = answers[name] = self.engine.reply(answer, tokens[0])
            turns.append(Message("assistant", reply.answer or ""))
        self.count += 1
        self._print(text, answers)

    def _print(self, prompt: str, answers: "dict[str, Reply]") -> None:
        if self.options.as_json:
            document: dict[str, Any] = {"prompt": prompt, "system": self.system}
            for name, answer in answers.items():
                document[name] = {
                    "text": answer.answer, "tokens": answer.completion_tokens,
                    "finish": answer.finish,
                } | ({"thoughts": answer.thoughts} if answer.thoughts else {})  # fmt: skip
            sys.stdout.write(json.dumps(document, ensure_ascii=False) + "\n")
        else:
            for name, answer in answers.items():
                heading = f"[{name}]\n" if len(answers) > 1 else ""
                # An answer may contain control characters of the terminal.
                sys.stdout.write(f"{heading}{legible(answer.answer or answer.thoughts)}\n")
        sys.stdout.flush()
