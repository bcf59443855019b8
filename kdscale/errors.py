"""Errors a user can act on.

Every one says what is wrong, what was expected, what came and what to do. The command line prints the message
without a traceback and leaves with the class's `exit_code`; anything else that escapes is a bug of ours and keeps
its traceback.
"""

from __future__ import annotations

import signal
from collections.abc import Sequence

from kdscale.escaping import for_terminal
from kdscale_launch.environment import without_credentials

_LONGEST_PART = 4000  # characters: a value that somebody else chose may be megabytes


class KdscaleError(Exception):
    """Base of all errors that a user can do something about; not a ValueError, so no broad handler takes it for one.

    `what` names the thing (a config field, a file); `expected`, `got` and `hint` are optional sentences.
    """

    exit_code = 1
    worth_retrying = False  # whether the same command may work when a launcher starts it again

    def __init__(self, what: str, *, expected: str | None = None, got: str | None = None, hint: str | None = None):
        what, expected, got, hint = (_cut(part) for part in (what, expected or "", got or "", hint or ""))
        self.what, self.expected, self.got, self.hint = what, expected, got, hint
        lines = [what]
        lines += [f"  expected: {expected}"] if expected else []
        lines += [f"  got:      {got}"] if got else []
        lines += [f"  to do:    {hint}"] if hint else []
        super().__init__(for_terminal(without_credentials("\n".join(lines))))

    @property
    def parts(self) -> dict[str, str]:
        """The arguments from which another process makes the same error; ERRORS_BY_CODE has its class."""
        return {"what": self.what, "expected": self.expected, "got": self.got, "hint": self.hint}


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST_PART else f"{text[:_LONGEST_PART]}… ({len(text):,} characters)"


def raise_together(errors: Sequence[KdscaleError]) -> None:
    """Raise the one error, or one of the first error's class that lists them all; nothing when there is none."""
    if len(errors) > 1:
        raise type(errors[0])("\n".join(map(str, errors)))
    if errors:
        raise errors[0]


class ConfigError(KdscaleError):
    """A configuration (or command line) that cannot be run; found before any work."""

    exit_code = 2


class CheckpointError(KdscaleError):
    """A model directory that is damaged, incomplete, unsafe or of a family that is not supported."""

    exit_code = 3


class DataError(KdscaleError):
    """Text that cannot be trained or measured on."""

    exit_code = 4


class RunFolderError(KdscaleError):
    """A run folder that cannot be used: other config, not writable, disk full, already in use."""

    exit_code = 5


class TrainingError(KdscaleError):
    """Distillation that had to stop: non-finite losses or gradients, or a failed self-check."""

    exit_code = 6


class SelfCheckError(KdscaleError):
    """A result of our own that did not pass its check; nothing was marked as finished."""

    exit_code = 7


class MissingProgramError(KdscaleError):
    """A program that is not installed or cannot be started: ssh, sbatch, kubectl, the Python of a host."""

    exit_code = 13


class LostRankError(KdscaleError):
    """A rank that ended without an error of ours: killed, or cut off from the others. Trying again may well work."""

    exit_code = 8
    worth_retrying = True


class HungRankError(LostRankError):
    """A rank that made no progress while its watchdog waited; its log has the stacks. Trying again may well work."""

    exit_code = 9


class ServiceError(KdscaleError):
    """A request that an address refuses or cannot answer, or an answer that does not hold what it must."""

    exit_code = 10


class MachineError(KdscaleError):
    """This machine lacks what was asked for: memory that may be locked or shared, a device.

    Another machine, or this one later, may have it.
    """

    exit_code = 11
    worth_retrying = True


class FileError(KdscaleError):
    """A file that is missing, cut short, or not what its name says."""

    exit_code = 12


class LackOfMemoryError(KdscaleError):
    """Memory, of the host or of a device, that did not suffice for a stage; the message names what lowers its need."""

    exit_code = 15


class SpendingLimitError(KdscaleError):
    """A limit of the config on what may be spent was reached; what was bought is kept, a higher limit goes on."""

    exit_code = 14


class GateError(KdscaleError):
    """A result that is worse than the config allows (`bias.fail_if`); everything was measured and written."""

    exit_code = 16


# Every error that has an exit code of its own: what a process that only sees the code raises in its place.
ERRORS_BY_CODE: dict[int, type[KdscaleError]] = {
    error.exit_code: error
    for error in (
        ConfigError, CheckpointError, DataError, RunFolderError, TrainingError, SelfCheckError, LostRankError,
        HungRankError, ServiceError, MachineError, FileError, MissingProgramError, SpendingLimitError,
        LackOfMemoryError, GateError,
    )
}  # fmt: skip


class Interrupted(BaseException):
    """Stopped on purpose by a signal (Ctrl-C, SIGTERM); the same command goes on.

    `kept`: nothing that was finished is lost. Not an Exception, so that no handler for errors takes it for one.
    """

    def __init__(self, signal_number: int, where: str = "", kept: bool = True):
        self.signal_number, self.kept = signal_number, kept
        self.exit_code = 128 + signal_number
        super().__init__(f"stopped by {signal.Signals(signal_number).name}" + (f" {where}" if where else ""))
