"""Tasks of lm-evaluation-harness, answered by the engine as one of its models.

Needs the `harness` extra. Prompts are tokenized and cut as by the harness's own `hf` model, so that
the scores are the same on the same weights.
"""

from collections.abc import Sequence
from typing import Any

from lm_eval import simple_evaluate, utils
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager

from job.chat.conversation import Message
from job.errors import UsageError
from job.evals.local_model import LocalModel
from job.evals.predictions import HarnessLine
from job.spec.evals import HarnessEval

_NEW_TOKENS = 256
"""Of a generated answer, where the task does not say; as in the harness."""


class EngineLM(TemplateLM):  # type: ignore[misc]
    """A local model as the harness calls it."""

    def __init__(self, local: LocalModel, name: str, max_length: int) -> None:
        """Prepare to answer requests; a prompt with its continuation has `max_length` tokens."""
        super().__init__()
        self._local = local
        self._chat = local.engine.tokenizer
        self._name = name
        self._max_length = max_length
        self._requests = 0
        self.prompts = self.truncated = 0
        """Prompts, and those of them that lost their beginning."""

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._chat.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token before a text that has no context."""
        return self._chat.eos_id if self._chat.bos_id is None else self._chat.bos_id

    @property
    def tokenizer_name(self) -> str:
        """The chat template's checksum."""
        return self._chat.template.sha256

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the text of the chat template."""
        return self._chat.template.text if chat_template else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render a conversation, up to the model's turn or into the turn that is begun."""
        turns = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        if add_generation_prompt:
            return self._chat.renderer.prompt(turns)
        return self._chat.renderer.reply_text(turns).removesuffix(self._chat.renderer.end_token)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: object
    ) -> list[int]:
        """Tokenize a text; special tokens in it count, and it gets one start token."""
        return self._chat.encode_markup(string, starts=add_special_tokens is not False)

    def _next_name(self) -> str:
        """Return a name for the cached batches; a task makes its requests in the same order."""
        self._requests += 1
        return f"{self._name}/{self._requests}"  # no evaluation has a "/" in its name

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], **_: object
    ) -> list[tuple[float, bool]]:
        rows = []
        self.prompts += len(requests)
        for _texts, context, continuation in requests:
            tokens = [*context, *continuation]
            self.truncated += len(tokens) > self._max_length + 1
            tokens = tokens[-self._max_length - 1 :]
            scored = min(len(continuation), len(tokens) - 1)
            rows.append((tokens, [False] * (len(tokens) - scored) + [True] * scored))
        local = self._local
        scores = local.engine.score_tokens(local.weights, rows, self._next_name(), local.cache)
        return [(score.loglikelihood, score.is_greedy) for score in scores]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of each text, in windows that do not overlap."""
        windows, owners = [], []
        for number, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self._max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for number, (score, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[number] += score
        return sums

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Return greedy answers, cut at the task's stop texts."""
        answers: dict[int, str] = {}
        groups: dict[int, list[tuple[int, str, list[str]]]] = {}
        for number, request in enumerate(requests):
            context, options = request.args
            options = normalize_gen_kwargs(options, _NEW_TOKENS)
            if options.get("do_sample"):
                raise UsageError(f"evals.harness: {self._name} samples; only greedy tasks can run")
            stop = handle_stop_sequences(options.get("until"), eos=None)
            groups.setdefault(options["max_gen_toks"], []).append((number, context, stop))
        for limit, group in groups.items():
            prompts = [self.tok_encode(context) for _, context, _ in group]
            longest = self._max_length - limit
            if longest < 1:
                raise UsageError(
                    f"evals.harness: {self._name} generates up to {limit} tokens, which leaves "
                    f"none for its prompts; raise evals.max_prompt_tokens ({self._max_length})"
                )
            self.prompts += len(prompts)
            self.truncated += sum(len(prompt) > longest for prompt in prompts)
            local, prompts = self._local, [prompt[-longest:] for prompt in prompts]
            rows = local.engine.generate(
                local.weights, prompts, limit, self._next_name(), local.cache
            )
            for (number, _, stop), row in zip(group, rows, strict=True):
                answers[number] = postprocess_generated_text(self._chat.decode(row), stop, None)
        return [answers[number] for number in range(len(requests))]


def check_task(entry: HarnessEval) -> TaskManager:
    """Return the harness's index of tasks, which has the task.

    Raises:
        UsageError: it does not.
    """
    manager = TaskManager(include_path=entry.include)
    if entry.task not in manager.all_tasks:
        raise UsageError(
            f"evals.harness: lm-evaluation-harness has no task {entry.task!r}; "
            "`lm-eval ls tasks` lists them, and `include` names a folder with more"
        )
    return manager


def evaluate(
    local: LocalModel, entry: HarnessEval, max_length: int
) -> tuple[list[HarnessLine], int]:
    """Run a task, or all tasks of a group.

    Returns:
        a line for each sample, and the number of truncated prompts.

    Raises:
        UsageError: there is no such task or metric, the task cannot run, or too many prompts are
            truncated.
    """
    model = EngineLM(local, entry.name, max_length)
    results = simple_evaluate(
        model=model, tasks=[entry.task], task_manager=check_task(entry), num_fewshot=entry.few_shot,
        limit=entry.limit, apply_chat_template=entry.chat_template, log_samples=True,
        bootstrap_iters=0, verbosity="ERROR",
    )  # fmt: skip
    local.check_truncated(entry.name, model.truncated, model.prompts)
    lines = [
        _line(entry, task, sample)
        for task, samples in results["samples"].items()
        for sample in sorted(samples, key=lambda sample: sample["doc_id"])
    ]
    return lines, model.truncated


def _line(entry: HarnessEval, task: str, sample: dict[str, Any]) -> HarnessLine:
    metrics = sample["metrics"]
    metric = entry.metric or metrics[0]
    if metric not in metrics:
        raise UsageError(
            f"evals.harness: {task} has no metric {metric!r}; write one of {', '.join(metrics)}"
        )
    value = sample[metric]
    if isinstance(value, tuple | list):  # a log-likelihood and its number of words or bytes
        value = value[0] / value[1]
    answers = [
        response[0] if isinstance(response, list | tuple) else response
        for response in sample["filtered_resps"]
    ]
    return HarnessLine(
        id=f"{task}-{sample['doc_id']}", metric=metric, score=float(value),
        target=str(sample["target"]), answers=answers,
    )  # fmt: skip
