"""What one forward leaves of chosen layers beside its result: hidden states, and what attention reads.

Hidden states come from hooks that are there during the forward alone, and queries, keys and values from the attention
function that kdscale gives to a model. So a layer that gradient checkpointing runs again in the backward is not
recorded again, and hooks see what DeepSpeed's hooks have made of a layer's output.

B sequences, P positions of this rank, N rows (flat positions with a label), H hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from kdscale.config.distill.objective import LayersRead
from kdscale.config.distill.targets import EMBEDDINGS, FINAL
from kdscale.errors import ConfigError
from kdscale.families import Family, load_family
from kdscale.models.attention import AttentionRows, within_documents


class LayerRecords:
    """The records of one forward: `layers_NH` hidden states of the rows, `attention` of all positions, by layer."""

    def __init__(self, layers: Sequence[nn.Module], read: LayersRead, last: nn.Module | None = None):
        """`last`: the module that the model ends with, where FINAL is read."""
        self._layers, self._read, self._last = layers, read, last
        self.layers_NH: dict[int, Tensor] = {}
        self.attention: dict[int, AttentionRows] = {}

    @contextmanager
    def of_forward(self, rows_N: Tensor) -> Iterator[dict[str, Any]]:
        """Around the forward, whose keyword arguments must include those that this gives."""
        # with gradients the rows are taken afterwards: an operation more within a layer would have to be there when
        # gradient checkpointing runs the layer again
        with ExitStack() as hooks:
            for number in self._read.hidden:
                hooks.callback(self._watch(number, None if torch.is_grad_enabled() else rows_N).remove)
            yield {"record": self._keep_attention} if self._read.attention else {}
        if torch.is_grad_enabled():
            self.layers_NH = {number: _rows(hidden_BPH, rows_N) for number, hidden_BPH in self.layers_NH.items()}

    def _watch(self, number: int, rows_N: Tensor | None) -> Any:
        def keep(hidden_BPH: Tensor) -> None:
            self.layers_NH[number] = hidden_BPH if rows_N is None else _rows(hidden_BPH, rows_N)

        if number == EMBEDDINGS:
            return self._layers[0].register_forward_pre_hook(lambda _, inputs: keep(inputs[0]))
        module = self._last if number == FINAL else self._layers[number]
        assert module is not None
        return module.register_forward_hook(
            lambda _, _inputs, output: keep(output[0] if isinstance(output, tuple) else output)
        )

    def _keep_attention(self, module: Any, rows: AttentionRows) -> None:
        if module.layer_idx in self._read.attention:
            self.attention[module.layer_idx] = rows


def _rows(hidden_BPH: Tensor, rows_N: Tensor) -> Tensor:
    return hidden_BPH.flatten(0, -2).index_select(0, rows_N)


class FinalStates:
    """What leaves a model of a known family, before anything that stands between it and a head: during the block."""

    def __init__(self, model: Any):
        self._last = _last_module(model, load_family(model.config.get_text_config().to_dict(), type(model).__name__))
        self.hidden_BSH = torch.empty(0)

    def __enter__(self) -> FinalStates:
        self._handle = self._last.register_forward_hook(self._keep)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _keep(self, _module: Any, _inputs: Any, output: Any) -> None:
        self.hidden_BSH = output[0] if isinstance(output, tuple) else output


def _last_module(model: Any, family: Family) -> nn.Module:
    """The module that a model ends with, before its head."""
    if family.sites.final_norm:
        return cast(nn.Module, model.get_submodule(family.sites.final_norm))
    return list(model.get_submodule(family.sites.layers).children())[-1]


class LayerReader:
    """Records the same layers of one model at every forward. Raises ConfigError for a model of which it cannot."""

    def __init__(self, model: Any, read: LayersRead):
        self._read = read
        self._layers: Sequence[Any] = ()
        self._last: Any = None
        if read.hidden or read.attention:
            config = model.config.get_text_config().to_dict()
            family = load_family(config, type(model).__name__)
            self._layers = list(model.get_submodule(family.sites.layers).children())
            self._last = _last_module(model, family)
            if without := [n for n in read.attention if "kv_heads" not in family.layer_axes(config, n)]:
                raise ConfigError(
                    "distill.objectives", expected="for attention, layers that have it",
                    got=f"layer {without[0]} of {type(model).__name__}, which has a recurrent mixer or an MLP instead",
                    hint="name pairs of layers with attention",
                )  # fmt: skip
        if read.attention and not within_documents(model):
            raise ConfigError(
                "distill.objectives", expected="for attention, models that take it from transformers' registry",
                got=type(model).__name__, hint="leave the objective attention out",
            )  # fmt: skip
        for number, layer in enumerate(self._layers if read.attention else ()):
            for module in layer.modules():  # DistilBERT's attention does not know its layer
                if hasattr(module, "is_causal") and getattr(module, "layer_idx", None) is None:
                    module.layer_idx = number

    def records(self) -> LayerRecords | None:
        """For the next forward; None where there is nothing to record."""
        return LayerRecords(self._layers, self._read, self._last) if self._read != LayersRead() else None
