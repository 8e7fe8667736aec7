"""Certificates of a network's own authority, the same for every client.

`huggingface_hub` reads `SSL_CERT_FILE`, `requests` the other two: whichever is set holds for all.
"""

import os
import ssl
from datetime import UTC, datetime
from pathlib import Path

from job.errors import SetupError

_WRONG_TIMES = (9, 10)
"""OpenSSL's codes of certificates that are not yet valid, and that have expired."""

_VARIABLES = ("SSL_CERT_FILE", "REQUESTS_CA_BUNDLE", "CURL_CA_BUNDLE")


def share_bundle() -> None:
    """Set every variable for a bundle of certificates that is not set to the first that is.

    Raises:
        SetupError: one names no file.
    """
    given = {name: os.environ[name] for name in _VARIABLES if os.environ.get(name)}
    for name, path in given.items():
        if not Path(path).exists():
            raise SetupError(f"{name}={path}: there is no such file; unset it or correct it")
    for name in _VARIABLES if given else ():
        os.environ.setdefault(name, next(iter(given.values())))


def certificate_problem(error: BaseException) -> str | None:
    """Explain an error that a certificate caused; None if another cause did.

    Such an error never passes by itself: a request that met it is not repeated.
    """
    seen: list[BaseException] = []
    waiting: list[object] = [error]
    while waiting:
        cause = waiting.pop()
        if not isinstance(cause, BaseException) or cause in seen:
            continue
        if isinstance(cause, ssl.SSLCertVerificationError):
            bundle = os.environ.get(_VARIABLES[0])
            used = f"; it is {bundle} now" if bundle else ""
            if cause.verify_code in _WRONG_TIMES:
                return (
                    f"the server's certificate is not valid at this machine's time, "
                    f"{datetime.now(UTC):%Y-%m-%d %H:%M} UTC ({cause.verify_message}): set its "
                    "clock if that is wrong"
                )
            return (
                f"the server's certificate is not trusted ({cause.verify_message}): if the "
                "network has an authority of its own, name the file of its certificates in "
                f"{_VARIABLES[0]}{used}"
            )
        seen.append(cause)
        waiting += [cause.__cause__, cause.__context__, getattr(cause, "reason", None), *cause.args]
    return None
