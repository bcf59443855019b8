"""What happens when a loss or a gradient is NaN or infinite.

The optimiser leaves weights and its own state (Adam's step count too) untouched; the step is counted here with the
documents of its batch; too many in a row end the run with the name of the layer where it starts.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kdscale.errors import TrainingError

_SHOWN_DOCUMENTS = 12


class SkipGuard:
    """Counts skipped steps. `state` and `restore` make it part of a checkpoint."""

    def __init__(self, max_in_a_row: int):
        self._max = max_in_a_row
        self.in_a_row = self.total = 0
        self._owed = False

    def record(self, skipped: bool) -> None:
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped

    @property
    def exhausted(self) -> bool:
        return self.in_a_row >= self._max

    def checkpoint_due(self, regular: bool) -> bool:
        """Whether to save now; a regular checkpoint waits for the end of a streak of skipped steps.

        A streak that ends the run may be one broken rank's: what it skipped is then trained again, from before it.
        """
        self._owed = self._owed or regular
        if not self._owed or self.in_a_row:
            return False
        self._owed = False
        return True

    def state(self) -> dict[str, int]:
        return {"in_a_row": self.in_a_row, "total": self.total}

    def restore(self, state: dict[str, int]) -> None:
        self.in_a_row, self.total = int(state["in_a_row"]), int(state["total"])


def show_documents(batches: Sequence[Any]) -> str:
    """`3, 17, 20`: the documents of these micro-batches, each once, at most a dozen."""
    ids = list(dict.fromkeys(document for batch in batches for document in batch.document_ids))
    more = f" and {len(ids) - _SHOWN_DOCUMENTS} more" if len(ids) > _SHOWN_DOCUMENTS else ""
    return ", ".join(map(str, ids[:_SHOWN_DOCUMENTS])) + more


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def _bad(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())


class Findings:
    """What the hooks of `watch` saw first; empty strings while everything is finite."""

    def __init__(self) -> None:
        self.forward = self.backward = ""


@contextmanager
def watch(module: nn.Module, prefix: str) -> Iterator[Findings]:
    """Find the first module whose output, and the first whose output's gradient, is not finite.

    Modules report when they return, so an inner module comes before the block around it, and in the backward pass the
    one nearest to the loss comes first.
    """
    found = Findings()

    def hook_for(name: str) -> Callable[..., None]:
        def look_back(grad: torch.Tensor) -> None:
            if not found.backward and _bad(grad):
                found.backward = name

        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            for tensor in _tensors(output):
                if not found.forward and _bad(tensor):
                    found.forward = name
                if tensor.requires_grad:
                    tensor.register_hook(look_back)

        return look

    handles = [sub.register_forward_hook(hook_for(f"{prefix}{name}")) for name, sub in module.named_modules() if name]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def by_rank(findings: Sequence[str]) -> list[str]:
    """What the ranks found, each finding once; with the ranks' numbers where they do not all agree."""
    distinct = list(dict.fromkeys(finding for finding in findings if finding))
    if len(set(findings)) < 2:
        return distinct
    ranks = {finding: ", ".join(str(r) for r, found in enumerate(findings) if found == finding) for finding in distinct}
    return [f"rank {ranks[finding]}: {finding}" for finding in distinct]


def stop_error(step: int, guard: SkipGuard, batches: Sequence[Any], findings: Sequence[str]) -> TrainingError:
    """The message that ends a run: which step, which documents, where the first non-finite value appears."""
    where = "; ".join(finding for finding in findings if finding)
    return TrainingError(
        f"distillation stopped at step {step}: {guard.in_a_row} steps in a row had a non-finite loss or gradient",
        expected="finite values",
        got=f"{where or 'finite values when the batch was run again'} (documents {show_documents(batches)})",
        hint="look at these documents and at the weights of the named layer; a lower distill.optimizer.lr, "
        "float32 or a longer warm-up often helps",
    )
