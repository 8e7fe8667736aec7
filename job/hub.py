"""What goes wrong at the Hugging Face Hub, told with the way out."""

import contextlib
from collections.abc import Iterator
from typing import Literal

from job.errors import EnvironmentProblem, StageError, UsageError


@contextlib.contextmanager
def hub_errors(
    kind: Literal["dataset", "model"], repository: str, revision: str | None
) -> Iterator[None]:
    """Turns what the Hub's libraries raise in this block into errors of this job."""
    from huggingface_hub import errors

    folder = "datasets/" if kind == "dataset" else ""
    page = f"https://huggingface.co/{folder}{repository}"
    name = f"hf://{repository}"
    try:
        yield
    except errors.GatedRepoError as error:
        raise EnvironmentProblem(
            f"the {kind} {name} is gated: accept its terms at {page} and set HF_TOKEN"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UsageError(f"the {kind} {name} has no revision {revision!r}; see {page}") from error
    except errors.RepositoryNotFoundError as error:
        raise UsageError(
            f"there is no {kind} {name}, or it is private: check the name, or set HF_TOKEN"
        ) from error
    except FileNotFoundError as error:
        # DatasetNotFoundError and the like of `datasets` are kinds of it.
        if "gated" in str(error):
            raise EnvironmentProblem(
                f"the {kind} {name} is gated: accept its terms at {page} and set HF_TOKEN"
            ) from error
        raise UsageError(f"the {kind} {name} is not as the spec says: {error}") from error
    except errors.LocalEntryNotFoundError as error:
        raise StageError(f"the Hub cannot be reached for the {kind} {name}: {error}") from error
    except (errors.EntryNotFoundError, ValueError) as error:
        raise UsageError(f"the {kind} {name} is not as the spec says: {error}") from error
    except (errors.HfHubHTTPError, OSError) as error:
        raise StageError(f"the Hub could not give the {kind} {name}: {error}") from error
    except Exception as error:
        if not type(error).__module__.startswith(("httpx", "datasets", "aiohttp", "fsspec")):
            raise
        raise StageError(f"the Hub could not give the {kind} {name}: {error}") from error
