"""The programs of other systems (sbatch, kubectl, sky): run with a limit, and told apart when they fail."""

from __future__ import annotations

import re
import shlex
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from kdscale.errors import ConfigError, KdscaleError, MissingProgramError
from kdscale.service.engines.engine import EngineUnavailableError

_SHOWN = 1000  # characters of what a program says
_BROKE_OFF = re.compile(r"timed? ?out|timeout|connection reset|broken pipe|zero bytes|unexpected eof", re.IGNORECASE)


class EngineSilentError(EngineUnavailableError):
    """A program that took too long, or whose connection broke. What it was to do may have been done."""


@dataclass(frozen=True)
class Answer:
    """What a program said, and its exit code."""

    command: tuple[str, ...]
    code: int
    output: str
    complaint: str

    @property
    def said(self) -> str:
        """The end of what it said for people."""
        return (self.complaint.strip() or self.output.strip())[-_SHOWN:]


def ask(
    command: Sequence[str], *, seconds: float, stdin: str = "", env: Mapping[str, str] | None = None
) -> Answer:  # fmt: skip
    """Run a program to its end, whatever its exit code.

    Raises MissingProgramError when it cannot be started, and EngineSilentError when it takes longer than `seconds`.
    """
    done = _run(command, seconds, stdin=stdin, env=env, stdout=subprocess.PIPE)
    return Answer(tuple(command), done.returncode, _text(done.stdout), _text(done.stderr))


def tail_of(command: Sequence[str], *, seconds: float, limit: int) -> bytes:
    """The last `limit` bytes that a program prints; what fails has printed nothing.

    A log that cannot be had must not keep anybody from anything: in its place comes a line that says why.
    """
    with tempfile.TemporaryFile() as output:
        try:
            done = _run(command, seconds, stdin="", env=None, stdout=output)
        except (EngineSilentError, MissingProgramError) as error:
            return f"[the log cannot be read now: {error.what}]\n".encode()[:limit]
        size = output.seek(0, 2)
        output.seek(max(0, size - limit))
        return output.read() if done.returncode == 0 else b""


def _run(
    command: Sequence[str], seconds: float, *, stdin: str, env: Mapping[str, str] | None, stdout: object
) -> subprocess.CompletedProcess[bytes]:  # fmt: skip
    try:
        return subprocess.run(
            list(command), input=stdin.encode(), stdout=stdout, stderr=subprocess.PIPE, timeout=seconds, check=False,
            env=None if env is None else dict(env), start_new_session=True,
        )  # type: ignore[call-overload]  # fmt: skip
    except OSError as error:
        raise MissingProgramError(
            f"cannot start {command[0]}", got=str(error.strerror), hint="install it, or check the service's PATH"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise EngineSilentError(f"{command[0]} did not answer", expected=f"an answer in {seconds:g} s") from error


def failure(answer: Answer, passing: re.Pattern[str]) -> KdscaleError:
    """The error that a failed program stands for.

    EngineSilentError where it may have done what it was to do, EngineUnavailableError where what it said matches
    `passing`, which another try may mend; else ConfigError, because the system does not take the run as it is.
    """
    program = shlex.join(answer.command[:2])[:80]
    if _BROKE_OFF.search(answer.complaint):
        return EngineSilentError(f"{program} did not get an answer", got=answer.said)
    if passing.search(f"{answer.complaint}\n{answer.output}"):
        return EngineUnavailableError(f"{program} cannot do it now", got=answer.said)
    return ConfigError(f"target: {program} left with exit code {answer.code}", got=answer.said)


def _text(raw: bytes | None) -> str:
    return (raw or b"").decode("utf-8", "replace")
