"""Saving checkpoints: on the spot, or in the background while training goes on.

In the background a save copies this rank's values to host memory (12 bytes for each parameter it holds; the memory is
kept for the next save) and returns; a thread writes, hashes and flushes them. When all ranks have `written` theirs,
they `finish`, and rank 0 seals the checkpoint. A second save waits for the first.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kdscale import files
from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.checkpoint.rank_files import AVERAGE, WrittenFile, write_rank_file
from kdscale.distill.checkpoint.zero_state import ZeroState
from kdscale.errors import RunFolderError
from kdscale.runtime.ranks import gather, on_main, rank, unequal_work, world_size

_CLOSE_SECONDS = 30.0


@dataclass(frozen=True)
class SavePolicy:
    """Which checkpoints are kept (distill.keep_checkpoints, keep_every), and whether they are written in background."""

    keep: int
    keep_every: int | None = None
    background: bool = False


class Saver:
    """Saves what one rank holds; `save` and `finish` are collective calls.

    `facts` go into every manifest; only rank 0's count. Raises RunFolderError on all ranks when any rank cannot write.
    """

    def __init__(
        self, folder: Path, zero_state: ZeroState, facts: dict[str, Any], policy: SavePolicy, device: torch.device
    ):
        self._folder, self._zero_state, self._facts, self._policy = folder, zero_state, facts, policy
        self._device = device
        self._pending: _WriteThread | None = None
        self._host: torch.Tensor | None = None

    def save(self, step: int, own: dict[str, Any], wait: bool) -> None:
        """Save the state after `step` steps; with `wait` it is sealed on return. `own` goes into this manifest only."""
        self.finish()
        facts = {**self._facts, **own, "adam_step": self._zero_state.adam_step, "ranks": world_size()}
        quantities = self._zero_state.quantities
        facts |= {AVERAGE: True} if AVERAGE in quantities else {}
        facts |= {"parameters": self._zero_state.shapes, "tied": self._zero_state.tied}
        facts |= {"helpers": self._zero_state.helpers}
        background = self._policy.background and not wait
        blocks, copied = self._copy() if background else (self._zero_state.blocks(), None)
        self._pending = _WriteThread(self._folder, step, facts, self._zero_state.ranges, quantities, blocks, copied)
        if background:
            self._pending.start()
        else:
            self.finish()

    @property
    def written(self) -> bool:
        """Whether this rank has written its part of a checkpoint that is not sealed, or failed to: `finish` is due."""
        return self._pending is not None and not self._pending.is_alive()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and seal it."""
        if self._pending is None:
            return
        write, self._pending = self._pending, None
        with unequal_work():  # parts and disks differ
            write.complete()
        results = gather([asdict(write.written) if write.written else None, _message(write.error)])
        failures = [f"rank {number}: {message}" for number, (_, message) in enumerate(results) if message]
        if failures:
            raise RunFolderError(
                f"checkpoint {checkpoint_folder.step_dir(self._folder, write.step)} could not be written",
                got="; ".join(failures[:4]),
                hint="earlier checkpoints are kept: mend the disk and run the same command again",
            ) from write.error
        on_main(lambda: self._seal(write, [written for written, _ in results if written is not None]))

    def _seal(self, write: _WriteThread, written: list[dict[str, Any]]) -> None:
        entries = {checkpoint_folder.rank_file(n): entry for n, entry in enumerate(written) if entry["bytes"]}
        with files.explain_os_errors(self._folder):
            checkpoint_folder.seal(self._folder, write.step, {**write.manifest, "files": entries})
            checkpoint_folder.rotate(self._folder, self._policy.keep, self._policy.keep_every)

    def close(self) -> None:
        """Cancel what is being written. Not a collective call: a rank that leaves by an exception calls it."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None

    def _copy(self) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        """This rank's values in host memory. Copies from a GPU are queued behind the step; the event is their end."""
        cuda = self._device.type == "cuda"
        if self._host is None:
            size = len(self._zero_state.quantities) * sum(span.length for span in self._zero_state.ranges)
            self._host = torch.empty(size, pin_memory=cuda)
        at, out = 0, []
        for block in self._zero_state.blocks():
            out.append(self._host[at : at + block.numel()])
            out[-1].copy_(block, non_blocking=cuda)
            at += block.numel()
        event = torch.cuda.Event() if cuda else None
        if event is not None:
            event.record()
        return out, event


def _message(error: Exception | None) -> str:
    return "" if error is None else getattr(error, "got", None) or str(error) or repr(error)


class _WriteThread(threading.Thread):
    """Writes one rank's file; afterwards `written` describes it, or there is the `error`."""

    def __init__(
        self,
        folder: Path,
        step: int,
        manifest: dict[str, Any],
        ranges: Any,
        quantities: tuple[str, ...],
        blocks: Any,
        copied: Any = None,
    ):
        super().__init__(name=f"checkpoint-{step}", daemon=True)
        self.step, self.manifest = step, manifest
        self.written: WrittenFile | None = None
        self.error: Exception | None = None
        self._folder, self._ranges, self._quantities = folder, ranges, quantities
        self._blocks, self._copied = blocks, copied
        self._cancelled = threading.Event()

    def run(self) -> None:
        """Write the file and keep what came of it, also when called in the calling thread."""
        try:
            self.written = self._write()
        except Exception as error:  # noqa: BLE001 - `Saver.finish` raises it, on all ranks
            self.error = error
        finally:
            self._blocks = ()

    def _write(self) -> WrittenFile:
        if self._copied is not None:
            self._copied.synchronize()
        tmp = checkpoint_folder.partial_dir(self._folder, self.step)
        with files.explain_os_errors(tmp):
            tmp.mkdir(parents=True, exist_ok=True)
            if not self._ranges:
                return WrittenFile(0, "", 0, "")
            return write_rank_file(
                tmp / checkpoint_folder.rank_file(rank()),
                self._ranges,
                self._blocks,
                self._cancelled.is_set,
                self._quantities,
            )

    def complete(self) -> None:
        """Wait for the thread; where it was not started, write in the calling one."""
        if self.ident is None:
            self.run()
        else:
            self.join()

    def cancel(self) -> None:
        """Stop at the next block; the unfinished files stay for `files.remove_leftovers`."""
        self._cancelled.set()
        if self.is_alive():
            self.join(_CLOSE_SECONDS)
