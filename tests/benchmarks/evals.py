"""Evaluation speed: the published `generate` call per question against this project's engine.

The published notebook generates one answer at a time, padded to 256 tokens, with KerasHub's
`generate` and the same limit of new tokens. The engine computes loglikelihoods of letters in one
forward pass, or generates in batches of prompts of similar length, with the batch size of the
recommended spec. Questions and dialogues are random tokens with the lengths of MedMCQA's
questions and ChatDoctor's prompts. Both sides run the same model, once to compile and once to be
timed, and their answers are compared. Letters need no new tokens: they are compared with answers
of 16 tokens, which is what the job generates, and with the unmodified published call, whose only
limit is the row of 256 tokens (on a few questions: a random model never stops).

    uv run python -m tests.benchmarks.evals [--json FILE]
"""

import os
import time
from collections.abc import Callable
from typing import Any

from tests.benchmarks import report
from tests.benchmarks.shapes import SHAPES, make_model, make_task

os.environ["KERAS_BACKEND"] = "jax"
LENGTH = 256
"""Length the published call pads to."""
LETTERS = [10, 11, 12, 13]
"""Tokens that stand for A to D."""


def make_prompts(count: int, mean: float, spread: float, longest: int) -> list[list[int]]:
    """Return random tokens with lengths around a mean."""
    import numpy as np

    generator = np.random.default_rng(0)
    lengths = np.clip(generator.normal(mean, spread, size=count), 24, longest).astype(int)
    return [[2, *generator.integers(20, 32_768, size=n - 1).tolist()] for n in lengths]


def limited_sampler(limit: int) -> Any:
    """Return KerasHub's greedy sampler with a limit of new tokens, which `generate` lacks."""
    import keras_hub

    class Limited(keras_hub.samplers.GreedySampler):
        def run_loop(self, cond: Any, body: Any, **rest: Any) -> Any:
            import jax.numpy as jnp

            most = jnp.minimum(rest.pop("maximum_iterations"), limit)
            return super().run_loop(cond, body, maximum_iterations=most, **rest)

    return Limited()


def generate_published(
    task: Any, prompts: list[list[int]], limit: int, stops: Any
) -> list[list[int]]:
    """Return the new tokens of each prompt, generated one prompt at a time."""
    import numpy as np

    # The function that `generate` calls for each input, without its tokenizer.
    generate = task.make_generate_function()
    answers = []
    for prompt in prompts:
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(prompt)] = prompt
        mask = np.arange(LENGTH)[None] < len(prompt)
        inputs = {"token_ids": tokens, "padding_mask": mask}
        answer = np.asarray(generate(inputs, stop_token_ids=stops)["token_ids"])[0]
        answers.append(answer[len(prompt) : len(prompt) + limit].tolist())
    return answers


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of a second call, and its result."""
    work()
    begin = time.perf_counter()
    result = work()
    return time.perf_counter() - begin, result


def main() -> None:
    """Measure both and print the ratios."""
    parser = report.arguments(__doc__ or "")
    parser.add_argument("--shape", choices=sorted(SHAPES), default="proxy")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--questions", type=int, default=100)
    parser.add_argument("--dialogues", type=int, default=20)
    parser.add_argument("--unlimited", type=int, default=8, help="questions without the limit")
    parser.add_argument("--batch-size", type=int, default=32)
    given = parser.parse_args()

    import jax
    import numpy as np

    from job.chat.tokenizer import OptionTokens
    from job.evals.engine import Engine

    model = make_model(given.shape, given.dtype)
    stops = model.tokenizer.stop_ids
    # The tokenizer lacks most of this vocabulary, so an answer's text is its token ids.
    model.tokenizer.decode = lambda tokens: " ".join(map(str, tokens))  # type: ignore[method-assign]
    engine = Engine(model, given.batch_size, 1024)
    task = make_task(given.shape, given.dtype)  # has the same weights

    def text(tokens: list[int]) -> str:
        ends = [i for i, token in enumerate(tokens) if token in stops]
        return model.tokenizer.decode(tokens[: ends[0]] if ends else tokens)

    def compare_generation(prompts: list[list[int]], limit: int) -> tuple[float, float, float]:
        task.compile(sampler=limited_sampler(limit))
        their_seconds, theirs = timed(lambda: generate_published(task, prompts, limit, stops))
        seconds, mine = timed(lambda: engine.generate(model.weights, prompts, limit, "generate"))
        pairs = zip(mine, theirs, strict=True)
        same = sum(text(answer) == text(tokens) for answer, tokens in pairs) / len(prompts)
        return their_seconds, seconds, same

    questions = make_prompts(given.questions, 92, 28, LENGTH - 16)
    dialogues = make_prompts(given.dialogues, 105, 30, LENGTH - 128)
    rows: list[tuple[str, float, float, float]] = []
    rows.append(("questions, 16 new tokens", *compare_generation(questions, 16)))
    letters = OptionTokens([], LETTERS)
    seconds, scores = timed(
        lambda: engine.loglikelihood(model.weights, questions, letters, "letters")
    )
    logits = [task({"token_ids": np.array([p]), "padding_mask": np.ones((1, len(p)))})[0, -1]
              for p in questions[:20]]  # fmt: skip
    theirs = np.asarray(jax.nn.log_softmax(np.stack(logits)))[:, LETTERS]
    agree = float(np.mean(np.abs(scores[:20] - theirs).max(axis=1) < 1e-3))
    rows.append(("questions, letters", rows[0][1], seconds, agree))
    rows.append(("dialogues, 128 new tokens", *compare_generation(dialogues, 128)))
    task.compile(sampler="greedy")
    some = questions[: given.unlimited]
    unlimited = (
        timed(lambda: generate_published(task, some, LENGTH, stops))[0] * len(questions) / len(some)
    )
    generation, letter_scores, dialogue = (theirs / mine for _, theirs, mine, _ in rows)
    rows.append(("questions, letters; published without limit", unlimited, seconds, agree))
    report.show(
        f"{given.shape}, {given.dtype}, {given.questions} questions, {given.dialogues} dialogues, "
        f"{jax.devices()[0].device_kind}",
        ("what", "published s", "ours s", "same answers"),
        rows,
    )
    report.finish(
        {
            "letters_speedup": letter_scores,
            "letters_speedup_unlimited": unlimited / seconds,
            "generate_speedup": generation,
            "dialogue_speedup": dialogue,
            "same_answers": min(same for *_, same in rows),
        },
        given.json,
    )


if __name__ == "__main__":
    main()
