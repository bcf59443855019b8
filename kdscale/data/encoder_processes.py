"""Tokenising in several processes: the library's own threads share one interpreter, which then is what limits them."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Self, TypeVar

from kdscale.data.tokenizing import BatchEncoder, EncodedText
from kdscale.errors import MachineError

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
        self._encoder = encoder
        self._pipes: list[Connection] = []
        self._processes: list[BaseProcess] = []
        context = multiprocessing.get_context("spawn")  # forking a process with threads can hang
        for _ in range(processes if processes > 1 else 0):
            pipe, workers_end = context.Pipe()
            process = context.Process(target=_serve, args=(workers_end, encoder.json), daemon=True)
            process.start()
            self._processes.append(process)
            workers_end.close()
            self._pipes.append(pipe)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            process.join()

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
        try:
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
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise MachineError(
                "a process that tokenises has died",
                hint="it may have run out of memory: give data.processes a smaller number",
            ) from error


def _serve(pipe: Connection, tokenizer_json: str) -> None:
    """A worker: encode what comes until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent closes the pipe
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    encoder = BatchEncoder(tokenizer_json)
    while True:
        try:
            pipe.send(encoder.encode(pipe.recv()))
        except (EOFError, BrokenPipeError, ConnectionResetError):
            return
