"""Steps whose loss or gradient is NaN or infinite.

The optimiser leaves the weights and its own state (Adam's step count too) as they were. Such steps are counted here;
too many in a row end the run with a message that names the documents and the layer of the first bad value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from kdscale.errors import TrainingError
from kdscale.models.compiling import uncompiled
from kdscale.runtime.device import tensors_in

_DOZEN = 12


class SkipGuard:
    """Counts skipped steps, at most `max_in_a_row` of them; `state` and `restore` make it part of a checkpoint."""

    def __init__(self, max_in_a_row: int):
        self._max_in_a_row = max_in_a_row
        self.in_a_row = self.total = 0
        self._checkpoint_due = False

    def record(self, skipped: bool) -> None:
        """Count a step."""
        self.in_a_row = self.in_a_row + 1 if skipped else 0
        self.total += skipped

    @property
    def exhausted(self) -> bool:
        """Whether the run must end."""
        return self.in_a_row >= self._max_in_a_row

    def checkpoint_due(self, regular: bool) -> bool:
        """Whether to save now; a regular checkpoint waits for the end of a streak of skipped steps.

        A streak that ends the run may be one broken rank's: what it skipped is then trained again, from before it.
        """
        self._checkpoint_due = self._checkpoint_due or regular
        if not self._checkpoint_due or self.in_a_row:
            return False
        self._checkpoint_due = False
        return True

    def state(self) -> dict[str, int]:
        """JSON values for a checkpoint's manifest."""
        return {"in_a_row": self.in_a_row, "total": self.total}

    def restore(self, state: dict[str, int]) -> None:
        """Go on from what `state` returned."""
        self.in_a_row, self.total = int(state["in_a_row"]), int(state["total"])


def show_documents(batches: Sequence[Any]) -> str:
    """`3, 17, 20`: the documents of these micro-batches, each once, at most a dozen."""
    ids = list(dict.fromkeys(document for batch in batches for document in batch.document_ids))
    return first_dozen([str(document) for document in ids])


def first_dozen(names: Sequence[str]) -> str:
    """`3, 17 and 5 more`: at most a dozen of `names`, and how many are left."""
    more = f" and {len(names) - _DOZEN} more" if len(names) > _DOZEN else ""
    return ", ".join(names[:_DOZEN]) + more


def _non_finite(tensor: torch.Tensor) -> bool:
    return tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())


class FirstNonFinite:
    """The module whose output, and the one whose output's gradient, was the first not to be finite; "" for none."""

    def __init__(self) -> None:
        self.forward = self.backward = ""


@contextmanager
def watch(module: nn.Module, prefix: str) -> Iterator[FirstNonFinite]:
    """Find the first module whose output, and the first whose output's gradient, is not finite.

    Modules report when they return, so an inner module comes before the block around it, and in the backward pass the
    one nearest to the loss comes first.
    """
    first = FirstNonFinite()

    def hook_for(name: str) -> Callable[..., None]:
        def look_back(grad: torch.Tensor) -> None:
            if not first.backward and _non_finite(grad):
                first.backward = name

        def look(_module: nn.Module, _args: Any, output: Any) -> None:
            for tensor in tensors_in(output):
                if not first.forward and _non_finite(tensor):
                    first.forward = name
                if tensor.requires_grad:
                    tensor.register_hook(look_back)

        return look

    handles = [sub.register_forward_hook(hook_for(f"{prefix}{name}")) for name, sub in module.named_modules() if name]
    try:
        with uncompiled():
            yield first
    finally:
        for handle in handles:
            handle.remove()


def first_non_finite(teacher: FirstNonFinite, student: FirstNonFinite, finite_loss: bool, parameter: str) -> str:
    """What one rank found when it ran a batch again, in words; "" when everything was finite.

    `parameter` is the one nearest to the loss whose gradient is not finite, or "".
    """
    if teacher.forward:
        return f"first non-finite value: output of the teacher's {teacher.forward}"
    if student.forward:
        return f"first non-finite value: output of the student's {student.forward}"
    if not finite_loss:
        return "every layer's output is finite, the loss is not"
    if student.backward:
        return f"forward is finite; first non-finite gradient: output of the student's {student.backward}"
    return f"forward is finite; first non-finite gradient: parameter {parameter}" if parameter else ""


def by_rank(causes: Sequence[str]) -> list[str]:
    """What the ranks found, in order of rank, each cause once; with the ranks' numbers where they do not all agree."""
    distinct = list(dict.fromkeys(cause for cause in causes if cause))
    if len(set(causes)) < 2:
        return distinct
    ranks = {cause: ", ".join(str(r) for r, other in enumerate(causes) if other == cause) for cause in distinct}
    return [f"rank {ranks[cause]}: {cause}" for cause in distinct]


def stop_error(step: int, guard: SkipGuard, batches: Sequence[Any], causes: Sequence[str]) -> TrainingError:
    """The message that ends a run: which step, which documents, where the first non-finite value appears."""
    where = "; ".join(cause for cause in causes if cause)
    return TrainingError(
        f"distillation stopped at step {step}: {guard.in_a_row} steps in a row had a non-finite loss or gradient",
        expected="finite values",
        got=f"{where or 'finite values when the batch was run again'} (documents {show_documents(batches)})",
        hint="look at these documents and at the weights of the named layer; a lower distill.optimizer.lr, "
        "float32 or a longer warm-up often helps",
    )
