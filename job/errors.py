"""Errors that a user can cause or must act on, each with its exit code.

They never show a traceback; any other exception that escapes is a bug. A message says what was
wrong, where, and what to write or do instead.
"""

from dataclasses import dataclass

EXIT_SPEC = 2
EXIT_ENVIRONMENT = 3
EXIT_STAGE = 4
EXIT_RESUMABLE = 75


class JobError(Exception):
    """Base of all errors that are shown as one message and end with an exit code."""

    exit_code = EXIT_STAGE


class UsageError(JobError):
    """Wrong arguments, or arguments that name something that does not exist."""

    exit_code = EXIT_SPEC


@dataclass(frozen=True)
class Problem:
    """One problem of a spec."""

    where: str
    """'file:line' or '--set key=value'."""
    path: str
    """Dotted path of the key; empty if the problem has none."""
    message: str

    def __str__(self) -> str:
        return ": ".join(part for part in (self.where, self.path, self.message) if part)


class SpecError(UsageError):
    """A wrong spec, with all of its problems in the order of the file."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class SetupError(JobError):
    """An environment that does not match the spec: backend, platform, devices, credentials."""

    exit_code = EXIT_ENVIRONMENT


class StageError(JobError):
    """A failed stage."""

    exit_code = EXIT_STAGE


class RunStoppedError(BaseException):
    """An early stop on request; the same command resumes the run.

    Not an `Exception`, so that no library handles it as a failure of its own.
    """

    exit_code = EXIT_RESUMABLE
