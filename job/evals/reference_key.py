"""Whether the reference model can be asked: looked at early, so nothing heavy is imported."""

import math
import os
from collections.abc import Mapping

from job.errors import EnvironmentProblem
from job.spec import Reference

KEY = "OPENROUTER_API_KEY"


def missing_key(reference: Reference) -> str | None:
    """What to tell the user if the key is not set.

    Raises:
        EnvironmentProblem: it is set to something that no key is.
    """
    key = os.environ.get(KEY, "").strip()
    if key and not (key.isascii() and key.isprintable()):
        raise EnvironmentProblem(f"{KEY} holds characters that no key has; set it again")
    if key:
        return None
    return f"{KEY} is not set: the comparison with {reference.model} will be skipped"


def could_do_more(outcome: Mapping[str, object], reference: Reference | None) -> bool:
    """Whether a stage that left questions open could have them answered now."""
    if reference is None or missing_key(reference) is not None:
        return False
    stopped_at = outcome.get("stopped_at_usd")
    if isinstance(stopped_at, float) and (reference.max_usd or math.inf) <= stopped_at:
        return False
    return outcome.get("open") is True
