"""What a criterion sees of one layer while the calibration tokens run through it, and the sums that criteria share.

All sums are fp32 within a batch and fp64 across batches, whatever the weights are in; Gram matrices stay in fp32.

B batch · S sequence · D hidden · U inputs of a sublayer's last projection (ffn units, or heads · head_dim)
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from kdscale.families import TensorSpec
from kdscale.families.writers import SHARED_DOWN, layer_writers
from kdscale.models.layer_pass import add_product
from kdscale.models.layer_stream import DecoderLayer, LayerStream
from kdscale.prune.importance.expert_scores import ExpertSums
from kdscale.runtime.ranks import all_reduce_sum

# The input of a sublayer's last projection, or `ssm_in`: the output of a mixer's first one.
Sublayer = Literal["ffn", "heads", "ssm", "ssm_in"]
T = TypeVar("T")

# Called when all tokens have run through the layer; returns the finished score over the tokens of all ranks.
Collector = Callable[[], Tensor]


class LayerContext:
    """One layer of the teacher, or with `layer=None` the final norm alone.

    `norms`: the norms over the residual stream. `ridge`: the regularisation of criteria that refit
    (`prune.ridge_lambda`). `model_wide`: one dictionary for all layers of a pass, for `once`. `mlp`: the role of the
    projection that stands for the sublayer `ffn`.
    """

    def __init__(
        self,
        stream: LayerStream,
        layer: DecoderLayer | None,
        norms: Sequence[nn.Module],
        ridge: float,
        model_wide: dict[str, Any],
        mlp: str = "down",
    ):
        self.family, self.config, self.dims, self.device = stream.family, stream.config, stream.dims, stream.device
        self.norms, self.ridge = norms, ridge
        self._stream, self._layer, self._model_wide = stream, layer, model_wide
        self._roles: dict[Sublayer, str] = {"ffn": mlp, "heads": "o", "ssm": "ssm_out"}
        self._writers = {} if layer is None else layer_writers(self.family, self.config, layer.index)
        self._shared: LayerContext | None = None
        self._statistics: dict[Sublayer, dict[str, Callable[[Tensor], Tensor]]] = {}
        self._sums: dict[tuple[Sublayer, str], Tensor] = {}
        self._reduced: set[tuple[Sublayer, str]] = set()
        self._grams: dict[Sublayer, Tensor | None] = {}
        self._experts: ExpertSums | None = None
        self._covariances: Callable[[], list[Tensor]] | None = None
        self._watchers: list[Callable[[Tensor, Tensor], None]] = []

    @property
    def name(self) -> str:
        """What messages call it."""
        return "the final norm" if self._layer is None else f"layer {self._layer.index}"

    @property
    def is_final(self) -> bool:
        """Whether this is the final norm."""
        return self._layer is None

    def weight(self, sublayer: Sublayer) -> Tensor:
        """The weight of the sublayer's last projection, [outputs, inputs] in fp32."""
        weight = self._projection(sublayer).weight
        assert isinstance(weight, Tensor)
        return weight.float().T if self.family.transposed(self._roles[sublayer]) else weight.float()

    def sum_over_batches(self, sublayer: Sublayer, name: str, statistic: Callable[[Tensor], Tensor]) -> Collector:
        """Sum `statistic` of what is seen of the sublayer [B, S, U] over all batches and ranks, in fp64.

        Criteria that ask for the same `name` share one sum.
        """
        self._hook(sublayer)
        self._statistics[sublayer].setdefault(name, statistic)
        return lambda: self._total(sublayer, name)

    def spec(self, role: str) -> TensorSpec | None:
        """What the family says of the layer's tensor of this role; None where there is none."""
        assert self._layer is not None
        specs = self.family.layer_tensors(self.config, self._layer.index).values()
        return next((spec for spec in specs if spec.role == role), None)

    def tensor(self, spec: TensorSpec) -> Tensor:
        """The parameter of the layer that this is about, in fp32."""
        assert self._layer is not None
        return self._layer.module.get_parameter(self._path(spec)).float()

    def buffer(self, site: str) -> Tensor | None:
        """The buffer that the family names as this site, in fp32; None where it names none."""
        assert self._layer is not None
        path: str = getattr(self._layer.sites, site)
        return self._layer.module.get_buffer(path).float() if path else None

    def gram(self, sublayer: Sublayer) -> Collector:
        """Sum xᵀx of the sublayer's input [U, U] over all batches and ranks, in fp32. The sum is given out once."""
        self._hook(sublayer)
        self._grams[sublayer] = None
        return lambda: self._take_gram(sublayer)

    def covariances(self) -> Callable[[], list[Tensor]]:
        """For each norm Σ over all tokens and ranks of x̂x̂ᵀ [D, D], fp32; x̂ is its input over its root mean square."""
        if self._covariances is None:
            sums = [torch.zeros(self.dims.hidden, self.dims.hidden, device=self.device) for _ in self.norms]
            for norm, sum_DD in zip(self.norms, sums, strict=True):
                norm.register_forward_pre_hook(lambda _, args, to=sum_DD: _add_normalised(to, args[0]))
            self._covariances = cache(lambda: [all_reduce_sum(sum_DD) for sum_DD in sums])
        return self._covariances

    def experts(self) -> ExpertSums | None:
        """The sums over each expert's tokens; None in a layer without experts."""
        writer = self._writers.get(self._roles["ffn"])
        if self._experts is None and self._layer is not None and writer is not None and writer.of_experts:
            self._experts = ExpertSums(self._layer.site(writer.path))
        return self._experts

    def watch(self, watcher: Callable[[Tensor, Tensor], None]) -> None:
        """Call `watcher(before_BSD, after_BSD)` with the hidden states around the layer, for every batch."""
        self._watchers.append(watcher)

    def see(self, before_BSE: Tensor, after_BSE: Tensor) -> None:
        """Show one batch to all watchers, of the states around the layer the stream."""
        for watcher in self._watchers:
            watcher(self._stream.stream(before_BSE), self._stream.stream(after_BSE))

    def once(self, key: str, make: Callable[[], T]) -> T:
        """What `make()` returned for the first layer: for answers that hold for the whole model."""
        if key not in self._model_wide:
            self._model_wide[key] = make()
        answer: T = self._model_wide[key]
        return answer

    def parts(self, axis: str) -> dict[str, LayerContext]:
        """What of the layer a criterion for `axis` is to see, by the axis that its scores are of.

        That is the layer itself, if it has such units. ffn units are scored under the name of the layer's own axis, and
        an expert that every token goes to is a part by itself.
        """
        if self._layer is None or axis == "layers":
            return {axis: self}
        if axis != "ffn":
            return {axis: self} if axis in self.family.layer_axes(self.config, self._layer.index) else {}
        out = {self._writers["down"].axis: self} if "down" in self._writers else {}
        if SHARED_DOWN in self._writers:
            if self._shared is None:
                self._shared = LayerContext(
                    self._stream, self._layer, self.norms, self.ridge, self._model_wide, SHARED_DOWN
                )
            out[self._writers[SHARED_DOWN].axis] = self._shared
        return out

    def _projection(self, sublayer: Sublayer) -> nn.Module:
        assert self._layer is not None
        if sublayer == "ssm_in":
            spec = self.spec(sublayer)
            assert spec is not None, f"{self.name} has no mixer"
            return self._layer.site(self._path(spec).removesuffix(".weight"))
        return self._layer.site(self._writers[self._roles[sublayer]].path)

    def _path(self, spec: TensorSpec) -> str:
        assert self._layer is not None
        return spec.parameter.removeprefix(self.family.layer_prefix(self._layer.index))

    def _hook(self, sublayer: Sublayer) -> None:
        if sublayer not in self._statistics:
            self._statistics[sublayer] = {}
            module = self._projection(sublayer)
            if sublayer == "ssm_in":
                module.register_forward_hook(lambda _, _args, out: self._add(sublayer, out.float()))
            else:
                module.register_forward_pre_hook(lambda _, args: self._add(sublayer, args[0].float()))

    def _add(self, sublayer: Sublayer, x_BSU: Tensor) -> None:
        for name, statistic in self._statistics[sublayer].items():
            value, key = statistic(x_BSU).double(), (sublayer, name)
            self._sums[key] = self._sums[key] + value if key in self._sums else value
        if sublayer in self._grams:
            x_NU = x_BSU.flatten(0, 1)
            self._grams[sublayer] = add_product(self._grams[sublayer], x_NU, x_NU)

    def _total(self, sublayer: Sublayer, name: str) -> Tensor:
        key = (sublayer, name)
        if key not in self._reduced:
            self._sums[key] = all_reduce_sum(self._sums[key])
            self._reduced.add(key)
        return self._sums[key]

    def _take_gram(self, sublayer: Sublayer) -> Tensor:
        gram_UU = self._grams.pop(sublayer)
        assert gram_UU is not None, "no batch has run through the layer"
        return all_reduce_sum(gram_UU)


def _add_normalised(sum_DD: Tensor, x: Tensor) -> None:
    x_ND = x.detach().flatten(0, -2).float()
    x_ND = x_ND * x_ND.square().mean(-1, keepdim=True).clamp_min(1e-30).rsqrt()
    sum_DD.addmm_(x_ND.T, x_ND)
