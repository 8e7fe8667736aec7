"""The errors a user can cause or must act on, each with the exit code it ends the command with.

Anything else that escapes is a bug and shows a traceback; these never do. A message says
what was wrong, where, and what to write or do instead.
"""

from dataclasses import dataclass

EXIT_SPEC = 2
EXIT_ENVIRONMENT = 3
EXIT_STAGE = 4
EXIT_RESUMABLE = 75


class JobError(Exception):
    """Base of all errors shown to the user as one message and an exit code."""

    exit_code = EXIT_STAGE


class UsageError(JobError):
    """The arguments, or what they name, are wrong."""

    exit_code = EXIT_SPEC


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a spec: `where` is 'file:line' or '--set key=value'."""

    where: str
    path: str
    message: str

    def __str__(self) -> str:
        return (
            f"{self.where}: {self.path}: {self.message}"
            if self.path
            else f"{self.where}: {self.message}"
        )


class SpecError(UsageError):
    """The spec is wrong; holds every problem found, in the order of the file."""

    def __init__(self, problems: list[Problem]) -> None:
        self.problems = problems
        super().__init__("\n".join(str(problem) for problem in problems))


class SetupError(JobError):
    """The machine is not what the spec asks for: backend, platform, devices, credentials."""

    exit_code = EXIT_ENVIRONMENT


class StageError(JobError):
    """A stage could not do its work."""

    exit_code = EXIT_STAGE


class RunStoppedError(BaseException):
    """Stopped early on request; the same command goes on from what was kept.

    Not an `Exception`, so that no library takes it for a failure of its own.
    """

    exit_code = EXIT_RESUMABLE
