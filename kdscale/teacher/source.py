"""Teachers: whoever gives targets for a micro-batch, in this process or elsewhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from kdscale.teacher.targets import FullTargets, TopKTargets


class Teacher(Protocol):
    """What the training loop asks of a teacher. B sequences, S positions, N rows with a label."""

    model: Any  # the module whose layers a diagnosis watches; an empty one where the model is elsewhere

    def expect(self, input_ids_BS: torch.Tensor, position_ids_BS: torch.Tensor, rows_N: torch.Tensor) -> None:
        """These targets will be asked for soon; whoever can begin already does."""

    def targets(
        self, input_ids_BS: torch.Tensor, position_ids_BS: torch.Tensor, rows_N: torch.Tensor
    ) -> TopKTargets | FullTargets:
        """Targets of the flat positions `rows_N`."""

    def close(self) -> None:
        """No more questions."""
