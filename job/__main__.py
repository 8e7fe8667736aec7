"""The `job` process: handle signals, run one command, end with its exit code."""

import os
import sys
from typing import NoReturn

from job.runtime.signals import STOP, exit_now

_ENVIRONMENT = {
    "TF_CPP_MIN_LOG_LEVEL": "2",
    "ARROW_DEFAULT_MEMORY_POOL": "system",  # returns freed memory to the OS
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}
"""Variables that libraries read when they are imported, unless the user sets them."""


def main() -> NoReturn:
    """Run the command line; signal handling starts before anything slow is imported.

    After an error the process ends immediately, because compiler threads and the other processes
    of a slice may still be busy.
    """
    STOP.install()
    os.environ["KERAS_BACKEND"] = "jax"
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    from job import cli

    code = cli.main()
    if code:
        exit_now(code)
    sys.exit(0)


if __name__ == "__main__":
    main()
