"""Tokenising in several processes: the library's own threads share one interpreter, which then is what limits them.

A tokenizer of 262,144 tokens takes about 300 MB. So the first process loads it once and forks the others, which share
its memory.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import traceback
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing.connection import Connection
from types import TracebackType
from typing import NoReturn, Self, TypeVar

from kdscale.errors import MachineError
from kdscale.models.tokenizer.tokenizing import BatchEncoder, EncodedText

BatchT = TypeVar("BatchT")

_MOST_PROCESSES = 16  # one process reads the text, and can feed about so many


def usable_cores() -> int:
    """Cores that this process may use, and that are worth a tokenising process."""
    return min(
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1, _MOST_PROCESSES
    )


class EncoderProcesses:
    """Encodes batches of texts in `processes` processes, or in this one where that is 1; a context manager.

    A worker ends when its pipe closes, so none outlives a killed parent. Each holds one batch at a time.
    """

    def __init__(self, encoder: BatchEncoder, processes: int):
        _return_freed_memory()  # what loading a tokenizer leaves can be more than the tokenizer
        self._encoder = encoder
        self._pipes: list[Connection] = []
        self._first_worker = None
        if processes <= 1:
            return
        context = multiprocessing.get_context("spawn")  # this process may have threads; forking it could hang
        pairs = [context.Pipe() for _ in range(processes)]
        self._pipes = [ours for ours, _ in pairs]
        workers_ends = [theirs for _, theirs in pairs]
        self._first_worker = context.Process(target=_serve_all, args=(workers_ends,), daemon=True)
        self._first_worker.start()
        for end in workers_ends:
            end.close()
        # not an argument: starting a process that ends before it has read more than a pipe holds would wait for ever
        with _explain_death():
            self._pipes[0].send(encoder.json)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        if self._first_worker is not None:
            self._first_worker.join()

    def encode(
        self, batches: Iterable[BatchT], texts_of: Callable[[BatchT], Sequence[str]]
    ) -> Iterator[tuple[BatchT, list[EncodedText]]]:
        """Each batch with its encoded texts, in the order of `batches`. Raises MachineError when a process dies."""
        if not self._pipes:
            for batch in batches:
                yield batch, self._encoder.encode(texts_of(batch))
            return
        at_work: deque[tuple[BatchT, Connection]] = deque()
        idle = deque(self._pipes)
        with _explain_death():
            for batch in batches:
                if not idle:
                    done, pipe = at_work.popleft()
                    yield done, pipe.recv()
                    idle.append(pipe)
                pipe = idle.popleft()
                pipe.send(texts_of(batch))
                at_work.append((batch, pipe))
            while at_work:
                done, pipe = at_work.popleft()
                yield done, pipe.recv()


@contextmanager
def _explain_death() -> Iterator[None]:
    """Raises MachineError when a pipe to a process breaks."""
    try:
        yield
    except (EOFError, BrokenPipeError, ConnectionResetError) as error:
        raise MachineError(
            "a process that tokenises has died",
            hint="it may have run out of memory: give data.processes a smaller number",
        ) from error


def _serve_all(pipes: list[Connection]) -> None:
    """The first worker: load the tokenizer, fork a worker for each further pipe, serve the first, wait for all."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes the pipes
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        encoder = BatchEncoder(pipes[0].recv())
    except EOFError:  # the parent has ended
        return
    encoder.encode(["a"])  # loads it
    _return_freed_memory()
    children = []
    for number, pipe in enumerate(pipes[1:], 1):
        child = os.fork()
        if child == 0:
            _end_after_serving(pipe, encoder, other_pipes=[pipes[0], *pipes[number + 1 :]])
        children.append(child)
        pipe.close()
    try:
        _serve(pipes[0], encoder)
    finally:
        pipes[0].close()  # the parent sees that this worker has ended, and closes the other pipes
        for child in children:
            os.waitpid(child, 0)


def _end_after_serving(pipe: Connection, encoder: BatchEncoder, other_pipes: Sequence[Connection]) -> NoReturn:
    """What a forked worker does. It never returns into the code of the process that it is a copy of."""
    code = 1
    try:
        for other in other_pipes:
            other.close()  # a pipe closes when its last holder closes it
        _serve(pipe, encoder)
        code = 0
    except Exception:  # noqa: BLE001 - nothing above it may run in a copy
        traceback.print_exc()
    finally:
        os._exit(code)


def _serve(pipe: Connection, encoder: BatchEncoder) -> None:
    """A worker: encode what comes until the pipe closes."""
    while True:
        try:
            pipe.send(encoder.encode(pipe.recv()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return


def _return_freed_memory() -> None:
    """Give the memory that was freed back to the system, where the C library has a call for it (glibc)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
