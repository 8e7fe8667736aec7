"""The prompts that every model is shown, so that their answers can be read side by side."""

from pydantic import BaseModel

from job.data.examples import Turn
from job.data.stage import VALIDATION, read_examples
from job.run import Run

MOST_SHOWN = 4
"""Held-out prompts shown where the spec says nothing."""


class SidePrompt(BaseModel):
    """A prompt, and the expected answer where one is known."""

    id: str
    prompt: str
    system: str | None
    expected: str | None
    history: tuple[Turn, ...] = ()


def side_prompts(run: Run) -> list[SidePrompt]:
    """Held-out prompts first, then the spec's own."""
    wanted = run.spec.evals.side_by_side
    count = MOST_SHOWN if wanted.examples is None else wanted.examples
    held_out = read_examples(run, VALIDATION, count)
    return [
        SidePrompt(
            id=e.id, prompt=e.prompt, system=e.system, expected=e.response, history=e.history
        )
        for e in held_out
    ] + [
        SidePrompt(id=f"prompt-{number}", prompt=prompt, system=None, expected=None)
        for number, prompt in enumerate(wanted.prompts, 1)
    ]
