"""A frozen teacher, wherever its weights are kept; layers kept elsewhere come while the layer before them computes.

`replicated` keeps the whole model on every rank; `partitioned` keeps 1/world of every weight on each; `offloaded` keeps
one copy in each host's memory. All three give the same bits. Where weights are kept elsewhere, only the embedding rows
of the batch's tokens are fetched, and the head is whole only inside `head()`.

B sequences, S positions, N = B·S tokens, V vocabulary, H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn

from kdscale.errors import CheckpointError, ConfigError
from kdscale.models.head import OutputHead, head_of
from kdscale.models.loading import load_model
from kdscale.models.parameter_map import ParameterReader
from kdscale.models.skeleton import build_skeleton
from kdscale.teacher.placement.movable_weights import MovableTable, MovableWeights, make_movable
from kdscale.teacher.placement.weight_stores import OffloadedStore, PartitionedStore, Pending, WeightStore

Placement = Literal["replicated", "partitioned", "offloaded"]


class PlacedTeacher(Protocol):
    """A frozen causal LM to run forward; `vocab` is the number of rows of its head.

    When the weights are partitioned, all ranks must run the same number of forwards, each followed by one `head()`;
    their batches may differ in size.
    """

    model: Any
    vocab: int

    def head(self) -> AbstractContextManager[OutputHead]:
        """The whole head, within the block; after it, too, when the teacher was placed with `keep_head`."""
        ...


class ReplicatedTeacher:
    """The model on this rank's device: whole, or this rank's slices of it (the whole head has `vocab` rows)."""

    def __init__(self, model: Any, vocab: int | None = None):
        self.model, self.vocab = model.eval().requires_grad_(False), vocab or head_of(model).vocab

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        """The head, which is always there."""
        yield head_of(self.model)


class StreamedTeacher:
    """A skeleton with hooks that fill each layer from a store just before it runs, and empty it afterwards."""

    def __init__(self, model: Any, movable: MovableWeights, store: WeightStore, vocab: int):
        self.model, self.vocab = model, vocab
        self._movable, self._store = movable, store
        self._empty = torch.empty(0, dtype=model.dtype, device=model.device)
        self._coming: dict[int, Pending] = {}  # by layer; the head's index follows the last layer's
        for index, unit in enumerate(movable.layers):
            unit.module.register_forward_pre_hook(self._enter_layer(index), prepend=True)
            unit.module.register_forward_hook(self._leave_layer(index))
        if movable.embed is not None:
            embedding = model.get_input_embeddings()
            embedding.register_forward_pre_hook(self._look_up(movable.embed), prepend=True)
            embedding.register_forward_hook(self._leave_table(movable.embed))

    @contextmanager
    def head(self) -> Iterator[OutputHead]:
        """The head, fetched for the block unless it stays on every rank."""
        table = self._movable.head
        if table is None:
            yield head_of(self.model)
            return
        self._begin(len(self._movable.layers))
        table.parameter.data = self._coming.pop(len(self._movable.layers))()
        try:
            yield head_of(self.model)
        finally:
            table.parameter.data = self._empty

    def _begin(self, index: int) -> None:
        """Start to fetch layer `index`, or the head after the last layer, unless it is on its way."""
        if index in self._coming:
            return
        if index < len(self._movable.layers):
            self._coming[index] = self._store.start_layer(index)
        elif self._movable.head is not None:
            self._coming[index] = self._store.start_table(self._movable.head)

    def _enter_layer(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: Any) -> None:
            self._begin(index)
            self._movable.layers[index].attach(self._coming.pop(index)())
            self._begin(index + 1)

        return hook

    def _leave_layer(self, index: int) -> Any:
        def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
            self._movable.layers[index].detach(self._empty)

        return hook

    def _look_up(self, table: MovableTable) -> Any:
        """Give the embedding a table of only the rows it is asked for, and ask it for them in order."""

        def hook(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
            ids_BS, *rest = args
            self._begin(0)
            table.parameter.data = self._store.rows(table, ids_BS.reshape(-1))
            return torch.arange(ids_BS.numel(), device=ids_BS.device).view(ids_BS.shape), *rest

        return hook

    def _leave_table(self, table: MovableTable) -> Any:
        def hook(_module: nn.Module, _args: Any, _output: Any) -> None:
            table.parameter.data = self._empty

        return hook


def place_teacher(
    path: Path,
    placement: Placement,
    *,
    dtype: torch.dtype,
    device: torch.device,
    trust_remote_code: bool = False,
    keep_head: bool = False,
) -> PlacedTeacher:
    """Load the causal LM at `path` so that this rank holds what `placement` says; a collective call.

    `keep_head`: the head's weight is whole on every rank all the time. Raises ConfigError, before any weight is read,
    for a model that can only be replicated; CheckpointError for one that cannot be loaded; MachineError when the host
    refuses the memory.
    """
    if placement == "replicated":
        options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        return ReplicatedTeacher(load_model(path, **options))
    try:
        weights = ParameterReader.open(path)
        model = build_skeleton(weights, dtype=dtype, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise ConfigError(
            "distill.teacher_placement",
            expected=f"a teacher that can be {placement}: of a family and a format that kdscale knows",
            got=f"{error.what}: {error.got}" if error.got else error.what,
            hint="replicated loads whatever transformers loads",
        ) from error
    movable = make_movable(model, weights, device, keep_head)
    store: WeightStore = (PartitionedStore if placement == "partitioned" else OffloadedStore)(
        movable, weights, dtype, device
    )
    return StreamedTeacher(model, movable, store, weights.family.dims(weights.checkpoint.config).vocab)
