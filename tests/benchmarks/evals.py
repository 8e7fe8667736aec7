"""Evaluation speed: one `generate` call a question, as published, against this project's engine.

The published way asks one question at a time, padded to 256 tokens, with KerasHub's own
`generate` and the same limit of new tokens. Ours scores letters by one forward pass, or generates
in batches of prompts of like length, as many at once as the recommended spec takes. Questions and
dialogues are random tokens with the lengths of MedMCQA's questions and ChatDoctor's prompts; both
sides run the same model, once to compile and once to be timed, and their answers are compared.
Letters need no new tokens: they are compared with answers of 16, which is what the job generates,
and with the published call as it stands, whose only limit is the 256 tokens of the row (some of
the questions, a random model never stops).

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
"""Tokens the published way pads to."""
LETTERS = [10, 11, 12, 13]
"""Tokens that stand for A to D."""


def make_prompts(count: int, mean: float, spread: float, longest: int) -> list[list[int]]:
    """Random tokens with lengths around a mean."""
    import numpy as np

    generator = np.random.default_rng(0)
    lengths = np.clip(generator.normal(mean, spread, size=count), 24, longest).astype(int)
    return [[2, *generator.integers(20, 32_768, size=n - 1).tolist()] for n in lengths]


def limited(limit: int) -> Any:
    """KerasHub's greedy sampler, which also stops after `limit` tokens, as `generate` cannot."""
    import keras_hub

    class Limited(keras_hub.samplers.GreedySampler):
        def run_loop(self, cond: Any, body: Any, **rest: Any) -> Any:
            import jax.numpy as jnp

            most = jnp.minimum(rest.pop("maximum_iterations"), limit)
            return super().run_loop(cond, body, maximum_iterations=most, **rest)

    return Limited()


def published(task: Any, prompts: list[list[int]], limit: int, stops: Any) -> list[list[int]]:
    """New tokens of each prompt, asked one at a time."""
    import numpy as np

    # What `generate` calls for each input; around it lies text, which there is none of here.
    generate = task.make_generate_function()
    found = []
    for prompt in prompts:
        tokens = np.zeros((1, LENGTH), np.int32)
        tokens[0, : len(prompt)] = prompt
        mask = np.arange(LENGTH)[None] < len(prompt)
        inputs = {"token_ids": tokens, "padding_mask": mask}
        answer = np.asarray(generate(inputs, stop_token_ids=stops)["token_ids"])[0]
        found.append(answer[len(prompt) : len(prompt) + limit].tolist())
    return found


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds of the second time, and what it gave."""
    work()
    begin = time.perf_counter()
    found = work()
    return time.perf_counter() - begin, found


def main() -> None:
    """Measure both ways and print the ratios."""
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
    stops = model.codec.stop_ids
    # The tokenizer does not know all of this vocabulary: an answer's text is its tokens' numbers.
    model.codec.decode = lambda tokens: " ".join(map(str, tokens))  # type: ignore[method-assign]
    engine = Engine(model, given.batch_size, 1024)
    task = make_task(given.shape, given.dtype)  # with the same weights

    def text(tokens: list[int]) -> str:
        ends = [place for place, token in enumerate(tokens) if token in stops]
        return model.codec.decode(tokens[: ends[0]] if ends else tokens)

    def generated(prompts: list[list[int]], limit: int) -> tuple[float, float, float]:
        task.compile(sampler=limited(limit))
        their_seconds, theirs = timed(lambda: published(task, prompts, limit, stops))
        seconds, mine = timed(lambda: engine.generate(model.weights, prompts, limit, "generate"))
        pairs = zip(mine, theirs, strict=True)
        same = sum(answer.text == text(tokens) for answer, tokens in pairs) / len(prompts)
        return their_seconds, seconds, same

    questions = make_prompts(given.questions, 92, 28, LENGTH - 16)
    dialogues = make_prompts(given.dialogues, 105, 30, LENGTH - 128)
    rows: list[tuple[str, float, float, float]] = []
    rows.append(("questions, 16 new tokens", *generated(questions, 16)))
    letters = OptionTokens([], LETTERS)
    seconds, scores = timed(
        lambda: engine.loglikelihood(model.weights, questions, letters, "letters")
    )
    logits = [task({"token_ids": np.array([p]), "padding_mask": np.ones((1, len(p)))})[0, -1]
              for p in questions[:20]]  # fmt: skip
    theirs = np.asarray(jax.nn.log_softmax(np.stack(logits)))[:, LETTERS]
    agree = float(np.mean(np.abs(scores[:20] - theirs).max(axis=1) < 1e-3))
    rows.append(("questions, letters", rows[0][1], seconds, agree))
    rows.append(("dialogues, 128 new tokens", *generated(dialogues, 128)))
    task.compile(sampler="greedy")
    some = questions[: given.unlimited]
    unlimited = timed(lambda: published(task, some, LENGTH, stops))[0] * len(questions) / len(some)
    generation, scored, talked = (theirs / mine for _, theirs, mine, _ in rows)
    rows.append(("questions, letters; published without limit", unlimited, seconds, agree))
    report.show(
        f"{given.shape}, {given.dtype}, {given.questions} questions, {given.dialogues} dialogues, "
        f"{jax.devices()[0].device_kind}",
        ("what", "published s", "ours s", "same answers"),
        rows,
    )
    report.finish(
        {
            "letters_speedup": scored,
            "letters_speedup_unlimited": unlimited / seconds,
            "generate_speedup": generation,
            "dialogue_speedup": talked,
            "same_answers": min(same for *_, same in rows),
        },
        given.json,
    )


if __name__ == "__main__":
    main()
