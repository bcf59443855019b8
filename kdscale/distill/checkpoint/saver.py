"""Saving checkpoints, on the spot or behind the training's back.

In the background a save copies this rank's values to host memory (12 bytes a parameter it holds, kept for the next
save) and returns; a thread writes, hashes and flushes them. After each later step one small collective asks whether all
ranks are done; when they are, rank 0 seals the checkpoint. A second save waits for the first.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from kdscale import files
from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.checkpoint.rank_files import WrittenFile, write_rank_file
from kdscale.distill.checkpoint.zero_state import ZeroState
from kdscale.errors import RunFolderError
from kdscale.runtime.ranks import all_reduce_sum, gather, on_main, rank, world_size

_CLOSE_SECONDS = 30.0


@dataclass(frozen=True)
class SavePolicy:
    """Which checkpoints stay, and whether they are written in the background."""

    keep: int
    keep_every: int | None = None
    background: bool = False


class Saver:
    """Saves one rank's share; `save`, `poll` and `finish` are collective calls.

    `facts` go into every manifest (rank 0's count). Raises RunFolderError on all ranks when any rank could not write.
    """

    def __init__(
        self, folder: Path, fragments: ZeroState, facts: dict[str, Any], rules: SavePolicy, device: torch.device
    ):
        self._folder, self._fragments, self._facts, self._rules = folder, fragments, facts, rules
        self._device = device
        self._pending: _Write | None = None
        self._host: torch.Tensor | None = None

    def save(self, step: int, own: dict[str, Any], wait: bool) -> None:
        """Save the state after `step` steps; with `wait` it is sealed on return. `own` goes into the manifest too."""
        self.finish()
        facts = {**self._facts, **own, "adam_step": self._fragments.adam_step, "ranks": world_size()}
        facts |= {"parameters": self._fragments.shapes, "tied": self._fragments.tied}
        background = self._rules.background and not wait
        blocks, copied = self._copy() if background else (self._fragments.blocks(), None)
        self._pending = _Write(self._folder, step, facts, self._fragments.ranges, blocks, copied)
        if background:
            self._pending.start()
        else:
            self._pending.run()
            self.finish()

    def poll(self) -> None:
        """Seal the checkpoint that is being written if all ranks have written theirs; never waits for a disk."""
        if self._pending is None:
            return
        done = not self._pending.is_alive()
        flags = torch.tensor([float(done), float(done and self._pending.facts is None)], device=self._device)
        written, failed = all_reduce_sum(flags).tolist()
        if failed or written == world_size():
            self.finish()

    def finish(self) -> None:
        """Wait for the checkpoint that is being written, if any, and seal it."""
        if self._pending is None:
            return
        write, self._pending = self._pending, None
        write.wait()
        answers: list[tuple[WrittenFile | None, str]] = gather((write.facts, _told(write.error)))
        failures = [f"rank {number}: {told}" for number, (_, told) in enumerate(answers) if told]
        if failures:
            raise RunFolderError(
                f"checkpoint {checkpoint_folder.step_dir(self._folder, write.step)} could not be written",
                got="; ".join(failures[:4]),
                hint="earlier checkpoints are kept: mend the disk and run the same command again",
            ) from write.error
        on_main(lambda: self._seal(write, [facts for facts, _ in answers if facts is not None]))

    def _seal(self, write: _Write, written: list[WrittenFile]) -> None:
        listed = {
            checkpoint_folder.rank_file(number): asdict(facts) for number, facts in enumerate(written) if facts.bytes
        }
        with files.explain_os_errors(self._folder):
            checkpoint_folder.seal(self._folder, write.step, {**write.manifest, "files": listed})
            checkpoint_folder.rotate(self._folder, self._rules.keep, self._rules.keep_every)

    def close(self) -> None:
        """Give up what is being written. Not a collective call: for a rank that leaves by an exception."""
        if self._pending is not None:
            self._pending.cancel()
            self._pending = None

    def _copy(self) -> tuple[list[torch.Tensor], torch.cuda.Event | None]:
        """This rank's values in host memory. From a GPU the copies are queued behind the step, not waited for."""
        cuda = self._device.type == "cuda"
        if self._host is None:
            size = 3 * sum(piece.length for piece in self._fragments.ranges)
            self._host = torch.empty(size, pin_memory=cuda)
        at, out = 0, []
        for block in self._fragments.blocks():
            out.append(self._host[at : at + block.numel()])
            out[-1].copy_(block, non_blocking=cuda)
            at += block.numel()
        event = torch.cuda.Event() if cuda else None
        if event is not None:
            event.record()
        return out, event


def _told(error: Exception | None) -> str:
    return "" if error is None else getattr(error, "got", None) or str(error) or repr(error)


class _Write(threading.Thread):
    """One rank's file being written; afterwards there are its `facts`, or the `error`."""

    def __init__(self, folder: Path, step: int, manifest: dict[str, Any], pieces: Any, blocks: Any, copied: Any = None):
        super().__init__(name=f"checkpoint-{step}", daemon=True)
        self.step, self.manifest = step, manifest
        self.facts: WrittenFile | None = None
        self.error: Exception | None = None
        self._folder, self._pieces, self._blocks, self._copied = folder, pieces, blocks, copied
        self._cancelled = threading.Event()

    def run(self) -> None:
        try:
            self.facts = self._written()
        except Exception as error:  # noqa: BLE001 - `Saver.finish` raises it, on all ranks
            self.error = error
        finally:
            self._blocks = ()

    def _written(self) -> WrittenFile:
        if self._copied is not None:
            self._copied.synchronize()
        tmp = checkpoint_folder.partial_dir(self._folder, self.step)
        with files.explain_os_errors(tmp):
            tmp.mkdir(parents=True, exist_ok=True)
            if not self._pieces:
                return WrittenFile(0, "", 0, "")
            return write_rank_file(
                tmp / checkpoint_folder.rank_file(rank()), self._pieces, self._blocks, self._cancelled.is_set
            )

    def wait(self) -> None:
        if self.is_alive():
            self.join()

    def cancel(self) -> None:
        """Stop at the next block; the files stay behind as leftovers of an unfinished checkpoint."""
        self._cancelled.set()
        if self.is_alive():
            self.join(_CLOSE_SECONDS)
