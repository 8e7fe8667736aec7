"""The `job` process: handle signals, run one command, end with its exit code."""

import sys
from typing import NoReturn

from job.runtime.signals import STOP, exit_now


def main() -> NoReturn:
    """Run the command line; signal handling starts before anything slow is imported.

    After an error the process ends immediately, because compiler threads and the other processes
    of a slice may still be busy.
    """
    STOP.install()
    from job import cli

    code = cli.main()
    if code:
        exit_now(code)
    sys.exit(0)


if __name__ == "__main__":
    main()
