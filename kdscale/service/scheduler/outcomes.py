"""What becomes of a run when its job has ended: one decision, from what is known, without doing anything."""

from __future__ import annotations

import signal
from dataclasses import dataclass

from kdscale.errors import ERRORS_BY_CODE
from kdscale.runtime.exits import FINAL_CODES
from kdscale.service.engines.engine import JobState
from kdscale.service.states import RunState
from kdscale_launch.job import STOPPED_EXIT_CODE

_KILLED = 128 + signal.SIGKILL
_LONGEST_QUOTE = 2000
_STABLE_SECONDS = 1800.0  # an attempt that ran for so long was no failed start: counting begins anew
_STOPPED_WAIT = 5.0  # before a run goes on that somebody else stopped


@dataclass(frozen=True)
class Attempt:
    """What is known when a job has ended: the run's state, its starts so far, and how long this one ran."""

    state: RunState
    tries: int
    seconds: float
    job: JobState
    printed: str = ""  # the end of what it printed


@dataclass(frozen=True)
class Outcome:
    """The state that follows, and why. For `recovering`: when it starts again, and how many tries count so far."""

    state: RunState
    reason: str
    wait: float = 0.0
    tries: int = 0


def outcome(attempt: Attempt, most_tries: int, retry_seconds: float) -> Outcome:
    """What follows the end of an attempt.

    Done is done, whoever asked to stop. A run that was asked to stop has stopped, whatever its code, but for codes that
    would come again. Otherwise 75 goes on soon and at no cost, and what may work the next time is tried `most_tries`
    times, with a wait that doubles.
    """
    code, why = attempt.job.exit_code, reason_of(attempt.job, attempt.printed)
    if attempt.job.phase == "ended" and code == 0:
        return Outcome("succeeded", "")
    if attempt.state == "cancelling":
        return Outcome("cancelled", "" if code == STOPPED_EXIT_CODE else f"it did not save before it ended: {why}")
    if code in FINAL_CODES:
        return Outcome("failed", why)
    if attempt.state == "pausing":
        unsaved = f"it goes on from its last checkpoint, as it did not save before it ended: {why}"
        return Outcome("paused", "" if code == STOPPED_EXIT_CODE else unsaved)
    if code == STOPPED_EXIT_CODE:
        return Outcome("recovering", why, min(_STOPPED_WAIT, retry_seconds), attempt.tries - 1)
    tries = 1 if attempt.seconds >= _STABLE_SECONDS else attempt.tries
    if tries >= most_tries:
        return Outcome("failed", f"after {tries} tries: {why}" if tries > 1 else why)
    return Outcome("recovering", why, retry_seconds * 2.0 ** (tries - 1), tries)


def reason_of(job: JobState, printed: str) -> str:
    """Why a job ended otherwise than well: what its exit code means, and its own last words."""
    if job.phase == "lost" or job.exit_code is None:
        return f"lost: {job.reason or 'nobody knows how it ended'}"
    code = job.exit_code
    if code == STOPPED_EXIT_CODE:
        return "stopped by somebody else, with everything saved"
    if code == _KILLED:
        return "killed (SIGKILL): memory ran out, or somebody ended it"
    words = "; ".join(filter(None, [job.reason, last_words(printed)]))
    if code > 128:
        return _with_words(f"ended by {_signal_name(code - 128)}", words)
    if last_error(printed):  # it says more than what its code means
        return f"{words} (exit code {code})" if "\n" not in words else f"exit code {code}: {words}"
    error = ERRORS_BY_CODE.get(code)
    meaning = (error.__doc__ or error.__name__).splitlines()[0].rstrip(".") if error is not None else "an error"
    return _with_words(f"{meaning} (exit code {code})", words)


def last_words(printed: str) -> str:
    """The error that a run printed at its end, or the last line where it printed none."""
    text = last_error(printed) or "".join(printed.rstrip().splitlines()[-1:])
    return text.strip()[-_LONGEST_QUOTE:]


def last_error(printed: str) -> str:
    """The error that a run printed at its end; empty where it printed none."""
    lines = printed.rstrip().splitlines()
    starts = [index for index, line in enumerate(lines) if line.startswith("error: ")]
    return "\n".join(lines[starts[-1] :]).removeprefix("error: ").strip() if starts else ""


def _with_words(meaning: str, words: str) -> str:
    return f"{meaning}: {words}" if words else meaning


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"
