"""The teacher at its full shape with the units that a plan drops silenced by hooks: what self_check.py compares with.

Norms under a mask: with c = √(d/d'), a norm over d channels of c·x, zero outside the d' kept ones, has exactly the mean
square that the student's norm has over d', epsilon included, and its output is c times what the student's is with the
teacher's γ. Hence: scale what enters by c and what leaves by norm_scale/c. LayerNorm: x less its mean over the kept
channels enters, and its bias is left out of the scaling. The same holds of a q or k norm over all heads (OLMo 2), where
the mask stands between the projection and the norm: the student's norm knows the kept heads only. And of the gated norm
of a recurrent mixer over all its heads, or over each group of them, which all keep as many.

State channels of Mamba 2 go with their rows of the convolution over B and C: zero then leaves it, and what follows adds
nothing to what a token reads.

Routers under a mask of experts are given the kept experts' rows, and what they choose is numbered as in the teacher.

B batch · S sequence · D teacher hidden
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from kdscale.families import Family, TensorSpec
from kdscale.families.schema import axis_blocks
from kdscale.families.writers import layer_writers
from kdscale.models.experts import down_weight, narrowed, router_tensor
from kdscale.models.layer_stream import DecoderLayer
from kdscale.prune.plan import UNIT_AXES, Plan


class UnitMask:
    """Hooks that silence the dropped units of a full-size layer, built from the plan's index lists alone."""

    def __init__(self, config: dict[str, Any], plan: Plan, family: Family, device: torch.device):
        self._config, self._plan, self._family, self._device = config, plan, family, device
        self.hidden_D = self._indicator(plan.kept.hidden, plan.teacher.hidden)
        # A tied head carries the factor of its embedding, and the student's final norm its inverse.
        folded = family.data.embed_multiplier == "sqrt_hidden" and bool(family.tied(config))
        self.head_factor = math.sqrt(plan.teacher.hidden / plan.student.hidden) if folded else 1.0

    def attach(self, layer: DecoderLayer, position: int) -> None:
        """Silence, in a layer of the teacher, what the student's layer `position` does not have."""
        for writer in layer_writers(self._family, self._config, layer.index).values():
            if writer.of_experts:
                self._experts(layer, position)
            else:
                kept_U = self._axis_indicator(writer.axis, position)
                layer.site(writer.path).register_forward_pre_hook(_scale_input(kept_U))
            written = self._axis_indicator(writer.writes, position)
            layer.site(writer.path).register_forward_hook(_scale_output(written))
        prefix = self._family.layer_prefix(layer.index)
        self._states(layer, position, prefix)
        for spec in self._family.layer_tensors(self._config, layer.index).values():
            # a norm of its own for each head (Cohere) has two axes, and knows nothing of the others
            over = spec.axes[0].split("*")[0] if len(spec.axes) == 1 else None
            if spec.role.endswith("_norm") and over in ("hidden", *UNIT_AXES):
                scale = self._plan.norm_scale if spec.axes[0] == "hidden" else 1.0
                path = spec.parameter.removeprefix(prefix).removesuffix(".weight")
                self._norm(layer.site(path), self._axis_indicator(spec.axes[0], position), scale)

    def embedding(self, model: nn.Module) -> None:
        """Make what stands between embedding and first layer compute what the student's does.

        The map to the layers' own inputs divides by √hidden; only the epsilon of the norm behind it tells.
        """
        self._outer_norms(model, "embed_norm")
        for spec in self._outer("layer_inputs"):
            module = model.get_submodule(spec.parameter.removesuffix(".weight"))
            module.register_forward_pre_hook(_scale_input(self.hidden_D))
            grow = math.sqrt(self._plan.teacher.hidden / self._plan.student.hidden)
            module.register_forward_hook(_scale_output(grow))

    def head(self, model: nn.Module) -> None:
        """The same of what an encoder has between its last layer and its head."""
        for spec in self._outer("transform"):
            model.get_submodule(spec.parameter.removesuffix(".weight")).register_forward_hook(
                _scale_output(self.hidden_D)
            )
        self._outer_norms(model, "transform_norm")

    def _outer_norms(self, model: nn.Module, role: str) -> None:
        for spec in self._outer(role):
            norm = model.get_submodule(spec.parameter.removesuffix(".weight"))
            self._norm(norm, self.hidden_D, self._plan.norm_scale)

    def _outer(self, role: str) -> list[TensorSpec]:
        return [spec for spec in self._family.outer_tensors(self._config).values() if spec.role == role]

    def final_norm(self, module: nn.Module) -> nn.Module:
        """Make the teacher's final norm compute what the student's does, on the kept channels."""
        return self._norm(module, self.hidden_D, self._plan.norm_scale / self.head_factor)

    def _norm(self, module: nn.Module, keep_D: Tensor, scale: float) -> nn.Module:
        grow, centred = math.sqrt(len(keep_D) / float(keep_D.sum())), self._family.data.norm.kind == "layer"
        bias_D = getattr(module, "bias", None)

        def enter(_module: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            x = args[0] * keep_D
            if centred:
                x = (x - x.sum(-1, keepdim=True) / keep_D.sum()) * keep_D
            return (x * grow, *args[1:])

        def leave(_module: Any, _args: Any, output: Tensor) -> Tensor:
            if bias_D is None:
                return output * (keep_D * (scale / grow))
            return ((output - bias_D) * (scale / grow) + bias_D) * keep_D

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave)
        return module

    def _states(self, layer: DecoderLayer, position: int, prefix: str) -> None:
        """Zero the rows of the convolution that belong to state channels that go, whatever computes with them."""
        if self._plan.student.ssm_state == self._plan.teacher.ssm_state:
            return
        for spec in self._family.layer_tensors(self._config, layer.index).values():
            if spec.role in ("ssm_conv", "ssm_conv_bias"):
                rows = layer.module.get_parameter(spec.parameter.removeprefix(prefix))
                kept_C = self._axis_indicator(spec.axes[0], position)
                rows.data = rows * kept_C.reshape(-1, *(1 for _ in spec.axes[1:]))

    def _experts(self, layer: DecoderLayer, position: int) -> None:
        """Columns of units that go are zeroed in each kept expert; the router has the kept experts to choose from."""
        plan = self._plan
        kept = plan.kept.experts[position]
        experts: Any = layer.site(layer.sites.experts)
        router: Any = layer.site(layer.sites.router)
        for expert in kept:
            units_F = self._indicator(plan.kept.ffn_of(position, expert), plan.teacher.ffn)
            down_weight(experts, expert).mul_(units_F)
        numbers = torch.tensor(kept, device=self._device)
        with narrowed(router, layer.router_axes, kept) as tensors:
            for name, tensor in tensors.items():
                router_tensor(router, name).data = tensor
        if hasattr(router, "num_experts"):
            router.num_experts = len(kept)
        if layer.sites.router_norm:  # the router's division by √hidden makes up for what leaves c times as large
            grow = math.sqrt(plan.teacher.hidden / plan.student.hidden)
            layer.site(layer.sites.router_norm).register_forward_pre_hook(_scale_input(self.hidden_D * grow))
        router.register_forward_hook(lambda _module, _args, output: (*output[:-1], numbers[output[-1]]))

    def _axis_indicator(self, axis: str, position: int) -> Tensor:
        """Of each number along an axis, of products of dimensions one after the other: whether all its units stay."""
        kept = []
        for block in axis_blocks(axis):
            kept_U = torch.ones(1, device=self._device)
            for factor in block:
                kept_U = torch.outer(kept_U, self._kept_units(factor, position)).flatten()
            kept.append(kept_U)
        return torch.cat(kept)

    def _kept_units(self, factor: str | int, position: int) -> Tensor:
        if factor == "hidden":
            return self.hidden_D
        if factor in ("ffn", *UNIT_AXES):
            return self._indicator(
                self._plan.kept.units(str(factor), position), getattr(self._plan.teacher, str(factor))
            )
        sizes = self._plan.teacher.dims().sizes() | self._family.fixed_sizes
        return torch.ones(factor if isinstance(factor, int) else sizes[factor], device=self._device)

    def _indicator(self, kept: list[int], size: int) -> Tensor:
        out = torch.zeros(size, device=self._device)
        out[kept] = 1.0
        return out


def _scale_input(factor: Tensor | float) -> Callable[[Any, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda _module, args: (args[0] * factor, *args[1:])


def _scale_output(factor: Tensor | float) -> Callable[[Any, Any, Tensor], Tensor]:
    return lambda _module, _args, output: output * factor
