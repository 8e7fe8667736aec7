"""`job`, and `python -m job`: signals are listened to before anything else is imported."""

from typing import NoReturn

from job.runtime.signals import STOP


def main() -> NoReturn:
    """The entry point."""
    STOP.install()
    from job import cli

    cli.main()


if __name__ == "__main__":
    main()
