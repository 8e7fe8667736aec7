"""What the failures of Cloud Storage mean: they may pass, or there is a way out to name."""

import contextlib
from collections.abc import Iterator

from google.api_core.exceptions import GoogleAPICallError
from google.auth.exceptions import GoogleAuthError, TransportError
from google.cloud.storage.exceptions import DataCorruption, InvalidResponse

from job.errors import StageError
from job.storage.retry import TransientError, raise_if_transient


@contextlib.contextmanager
def transient_failures() -> Iterator[None]:
    """Turn the client's failures that may pass into `TransientError`.

    Raises:
        StageError: an address is wrong.
    """
    import requests
    import urllib3

    wrong = requests.exceptions
    try:
        yield
    except (GoogleAPICallError, InvalidResponse) as error:
        response = error.response
        if response.status_code == 416:
            raise TransientError("the service has less of the object than it stated") from error
        raise_if_transient(
            response.status_code, response.reason, response.headers.get("Retry-After")
        )
        raise
    except (wrong.InvalidURL, wrong.MissingSchema, wrong.InvalidSchema) as error:
        raise StageError(f"STORAGE_EMULATOR_HOST is not an address: {error}") from error
    except GoogleAuthError as error:
        causes = (error, *error.args)
        if error.retryable or any(isinstance(cause, TransportError) for cause in causes):
            raise TransientError(str(error)) from error
        raise
    except (wrong.RequestException, urllib3.exceptions.HTTPError, ConnectionError) as error:
        raise TransientError(_reason(error)) from error
    except (DataCorruption, ValueError) as error:  # ValueError: invalid JSON, or a partial chunk
        raise TransientError(f"the reply is damaged: {error}") from error


def _reason(error: Exception) -> str:
    """Return the innermost reason, without the addresses of objects that HTTP libraries print."""
    kind = type(error).__name__
    if "timeout" in kind.lower() or "timed out" in str(error):
        return "no reply in time"
    inner = error.args[0] if error.args and isinstance(error.args[0], Exception) else error
    text = str(getattr(inner, "reason", None) or inner).rpartition(">: ")[2]
    return f"{kind}: {text}"


_WAYS_OUT = {
    "retention policy": "the bucket has a retention policy, but a run replaces and deletes its "
    "files: use another bucket",
    " hold": "the bucket holds its objects, but a run replaces and deletes its files: use another "
    "bucket, or release the hold",
    "requester pays": "the bucket's requester pays: set JOB_USER_PROJECT to the project to bill",
    "serviceusage.services.use": "the account in use needs "
    "roles/serviceusage.serviceUsageConsumer on the project JOB_USER_PROJECT",
    "vpcservicecontrols": "the organization's service perimeter (VPC Service Controls) keeps this "
    "machine from the bucket: run inside of it, or ask its administrators",
    "billing": "billing is disabled for the project of the bucket",
}
"""What to do by a part of a refusal's text: https://cloud.google.com/storage/docs/troubleshooting.

A missing role is the reason of all others.
"""


def way_out(error: GoogleAPICallError) -> str | None:
    """Return why a request was refused and what to do; None if it is no refusal."""
    text = error.response.text.lower()
    for part, way_out in _WAYS_OUT.items():
        if part in text and error.code in (400, 403):
            return way_out
    if error.code in (401, 403):
        return "the account in use needs roles/storage.objectUser on the bucket"
    return None


def is_of_bucket(error: GoogleAPICallError) -> bool:
    """Return whether it is the bucket that does not exist, not an object."""
    return error.code == 404 and "bucket does not exist" in error.response.text.lower()


def is_lost(error: GoogleAPICallError) -> bool:
    """Return whether an upload may succeed if it starts over.

    Its session is gone, nothing of a chunk was stored, or the content was damaged on the way.
    """
    if error.code == 400:
        return "crc32c" in error.response.text.lower()
    is_session = error.response.request.method == "PUT"
    return is_session and error.code in (308, 404, 410) and not is_of_bucket(error)
