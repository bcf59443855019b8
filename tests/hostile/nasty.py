"""Values and files that somebody else chose badly, on purpose or not, and what every case of them must be.

A case is accepted, or refused with a short message, in a short time and little memory.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdscale.errors import KdscaleError
from kdscale.files import remove_tree

_LONGEST_MESSAGE, _MOST_SECONDS, _MOST_WAITING, _MOST_BYTES = 8000, 10.0, 60.0, 1 << 30
OUTCOMES = ("accepted", "refused", "traceback", "hung", "memory", "wrongly accepted", "wrongly refused")
COUNTS: dict[str, Counter[str]] = {}  # outcomes by file of tests


def deep(levels: int) -> Any:
    """A list in a list in a list ..."""
    value: Any = 1
    for _ in range(levels):
        value = [value]
    return value


# In place of any value of a config or of a JSON file.
VALUES: dict[str, Any] = {
    "null": None, "true": True, "zero": 0, "minus one": -1, "half": 0.5, "int64": 2**63, "digits": 10**5000,
    "minus digits": -(10**5000), "infinity": float("inf"), "minus infinity": float("-inf"), "nan": float("nan"),
    "large": 1e300, "tiny": 5e-324, "empty text": "", "blank": " ", "text": "x", "long": "x" * 200_000,
    "number as text": "12", "digits as text": "9" * 5000, "newline": "a\nb", "escape": "\x1b[2J", "nul": "\x00",
    "surrogate": "\ud800", "markup": "[/red] {{ x }} <script>", "up": "../../etc/passwd", "device": "/dev/zero",
    "list": [], "list of null": [None], "object": {}, "object of null": {"": None}, "deep": deep(200),
    "wide": list(range(5000)), "keys": {f"k{index}": index for index in range(2000)},
}  # fmt: skip

NOT_FINITE = ("infinity", "minus infinity", "nan")
OUT_OF_ALL_RANGES = (*NOT_FINITE, "digits", "minus digits", "large")

# In place of the content of any file.
CONTENTS: dict[str, bytes] = {
    "empty": b"", "blank": b"\n", "list": b"[]", "object": b"{}", "null": b"null", "number": b"3", "text": b'"x"',
    "cut": b'{"stages": {"data"', "brackets": b"[" * 100_000, "braces": b'{"a":' * 900 + b"1" + b"}" * 900,
    "digits": b"9" * 5000, "digits in an object": b'{"stages": ' + b"9" * 5000 + b"}", "nan": b'{"stages": NaN}',
    "twice": b'{"a": 1, "a": 2}', "bom": b"\xef\xbb\xbf{}", "utf-16": '{"a": 1}'.encode("utf-16"), "binary": bytes(256),
    "bytes": bytes(range(256)), "long": b'"' + b"x" * 2_000_000 + b'"', "lists": b"[[]," * 20 + b"1" + b"]" * 20,
    "objects": b'{"stages": [], "made_from": [], "outputs": [], "facts": [], "kept": [], "files": [], "units": []}',
    "numbers": b'{"stages": 1, "made_from": 1, "outputs": 1, "facts": 1, "kept": 1, "files": 1, "models": 1}',
    "names": b'{"stages": {"data": {"state": 3}}, "made_from": {"files": {"x": 1}}, "outputs": {"x": 1}, "facts": {}}',
}  # fmt: skip


def _folder(path: Path) -> None:
    path.mkdir()
    (path / "inside").write_text("x")


SPECIAL_FILES: dict[str, Callable[[Path], None]] = {
    "missing": lambda path: None,
    "folder": _folder,
    "fifo": os.mkfifo,
    "loop": lambda path: path.symlink_to(path.name),
    "dangling": lambda path: path.symlink_to("nowhere"),
    "device": lambda path: path.symlink_to("/dev/zero"),
}


def damages() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """Every way to damage a file, by name; each call leaves something else (or nothing) in the file's place."""

    def replaced(make: Callable[[Path], Any]) -> Callable[[Path], None]:
        def damage(path: Path) -> None:
            remove_tree(path)
            make(path)

        return damage

    for name, content in CONTENTS.items():
        yield name, replaced(lambda path, content=content: path.write_bytes(content))  # type: ignore[misc]
    for name, make in SPECIAL_FILES.items():
        yield name, replaced(make)
    yield "half", lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def leaves(tree: Any, path: tuple[Any, ...] = (), most: int = 2) -> Iterator[tuple[Any, ...]]:
    """The place of every value in a JSON tree, as keys and indices; of a list only the first `most`."""
    if path:
        yield path
    items = tree.items() if isinstance(tree, dict) else enumerate(tree[:most]) if isinstance(tree, list) else ()
    for key, value in items:
        yield from leaves(value, (*path, key), most)


def edited(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of a JSON tree with another value in one place; lists and objects beside it are shared."""
    if not path:
        return value
    copy = dict(tree) if isinstance(tree, dict) else list(tree)
    copy[path[0]] = edited(copy[path[0]], path[1:], value)
    return copy


class _HungError(BaseException):
    """Not an Exception: no handler of the code under test takes it for one."""


class HostileCases:
    """Runs cases and collects those that fail, so that one test reports all of them.

    `where` names the file of tests, under which outcomes are counted in COUNTS.
    """

    def __init__(self, where: str = "") -> None:
        self.failures: list[str] = []
        self._where = where

    def run(self, name: str, call: Callable[[], Any], *, must: str = "") -> Any:
        """Run one case; `must`: "accept" or "refuse" where one of them is wrong. Returns what the call returned."""
        started, memory = time.monotonic(), _peak_bytes()
        result, outcome, problem = None, "accepted", ""
        try:
            with _limited_time(), _limited_memory():
                result = call()
        except KdscaleError as error:
            outcome, problem = "refused", _wrong_message(str(error))
            if must == "accept":
                outcome, problem = "wrongly refused", str(error)[:300]
        except _HungError:
            outcome, problem = "hung", f"took more than {_MOST_SECONDS} s of processor time, or {_MOST_WAITING} s"
        except BaseException as error:  # noqa: BLE001 (whatever it is, it is a failure of the case)
            outcome = "memory" if _is_lack_of_memory(error) else "traceback"
            problem = traceback.format_exc(limit=-4)[-900:]
        if (grown := _peak_bytes() - memory) > _MOST_BYTES:
            outcome, problem = "memory", f"{grown / 1e9:.1f} GB"
        if must == "refuse" and outcome == "accepted":
            outcome, problem = "wrongly accepted", "accepted"
        if problem:
            self.failures.append(f"{name}: {problem}")
        self._count(outcome, time.monotonic() - started)
        return result

    def _count(self, outcome: str, seconds: float) -> None:
        counts = COUNTS.setdefault(self._where, Counter())
        counts["cases"] += 1
        counts[outcome] += 1
        counts["milliseconds"] += round(1000 * seconds)

    def report(self) -> None:
        """Fail with every case that was neither accepted nor refused as it should be."""
        assert not self.failures, f"{len(self.failures)} cases:\n" + "\n".join(self.failures[:25])


def counts_in_words() -> Iterator[str]:
    """A line of counts for each file of tests, and one for all of them; none where no case was run."""
    total: Counter[str] = sum(COUNTS.values(), Counter())
    for where, counts in [*sorted(COUNTS.items()), ("hostile input", total)] if total else []:
        outcomes = ", ".join(f"{counts[outcome]:,} {outcome}" for outcome in OUTCOMES)
        yield f"{where}: {counts['cases']:,} cases in {counts['milliseconds'] / 1000:.0f} s: {outcomes}"


def _wrong_message(message: str) -> str:
    """What is wrong with a message for a user; empty where nothing is."""
    if len(message) > _LONGEST_MESSAGE:
        return f"a message of {len(message):,} characters"
    return f"a message that a terminal obeys: {message[:200]!r}" if "\x1b" in message else ""


def _is_lack_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "allocate memory" in str(error)


@contextmanager
def _limited_time() -> Iterator[None]:
    """End what computes for too long, however busy the machine is, or waits for ever."""
    timers = ((signal.ITIMER_PROF, signal.SIGPROF, _MOST_SECONDS), (signal.ITIMER_REAL, signal.SIGALRM, _MOST_WAITING))
    for timer, number, seconds in timers:
        signal.signal(number, _too_long)
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for timer, _, _ in timers:
            signal.setitimer(timer, 0)


@contextmanager
def _limited_memory() -> Iterator[None]:
    """Let allocations fail beyond what the process has now and twice what a case may take, where Linux can do that."""
    status = Path("/proc/self/status")
    if not status.exists():
        yield
        return
    data = next(line for line in status.read_text().splitlines() if line.startswith("VmData:"))
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(data.split()[1]) * 1024 + 2 * _MOST_BYTES, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _too_long(signal_number: int, frame: Any) -> None:
    raise _HungError
