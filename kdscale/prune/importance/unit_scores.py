"""What the streaming pass sums over the calibration tokens: the statistics behind the scores that importance.py names.

All of them are fp32 within a batch and fp64 across batches, whatever the weights are in.

B batch · S sequence · N = B·S tokens · D hidden · F ffn · Q query heads · K kv heads · P = Q/K · H head_dim
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdscale.families import Dims, Family
from kdscale.models.layer_stream import DecoderLayer
from kdscale.prune.importance.expert_scores import ExpertStats
from kdscale.prune.importance.optimal_brain_surgeon import head_removal_costs, removal_costs
from kdscale.runtime.ranks import all_reduce_sum


class UnitStats:
    """The scores of ffn units and of heads, and the energy of kv groups, in one layer.

    `obs`: the axes among ffn and heads whose removal costs (obs.py) are wanted too; they need the whole Gram matrix of
    the sublayer's input, which is kept in fp32, and `ridge`.
    """

    def __init__(
        self,
        dims: Dims,
        layer: DecoderLayer,
        family: Family,
        axes: Sequence[str],
        obs: Sequence[str] = (),
        ridge: float = 1e-2,
    ):
        self._dims, self._axes, self._obs, self._ridge = dims, axes, obs, ridge
        self._sites = family.sites
        self._layer, self._family = layer, family
        mixture = bool(family.sites.experts) and bool({"ffn", "experts"} & set(axes))
        self._experts = ExpertStats(layer.site(family.sites.experts)) if mixture else None
        self._sums: dict[str, Tensor] = {}
        self._grams: dict[str, Tensor] = {}

    def attach(self) -> list[Any]:
        """Register the hooks this layer needs; returns their handles."""
        handles = []
        if self._experts is not None:
            handles.append(self._experts.attach())
        elif "ffn" in self._axes:
            handles.append(self._hook(self._sites.ffn, self._see_ffn))
        if "heads" in self._axes or "kv_heads" in self._axes:
            handles.append(self._hook(self._sites.heads, self._see_heads))
        return handles

    def scores(self) -> dict[str, Tensor]:
        """Finished scores of this layer, fp64 on the CPU, over the tokens of all ranks."""
        sums = {name: all_reduce_sum(value) for name, value in self._sums.items()}
        dims, out = self._dims, dict[str, Tensor]()
        if self._experts is not None:
            found = self._experts.scores()
            out |= {name: value for name, value in found.items() if name.partition(".")[0] in self._axes}
        elif "ffn" in self._axes:
            weight_DF = self._weight(self._sites.ffn, "down")
            out["ffn.activation"] = sums["ffn"].sqrt()
            out["ffn.output_energy"] = sums["ffn_square"] * weight_DF.square().sum(0).double()
        if "heads" in self._axes or "kv_heads" in self._axes:
            out["heads.activation"] = sums["heads"].sqrt()
            group, width = dims.heads // dims.kv_heads, dims.head_dim
            weight = self._weight(self._sites.heads, "o").double()
            weight_KDPH = weight.reshape(-1, dims.kv_heads, group * width).transpose(0, 1)
            # ‖W x‖² summed over tokens is the trace of W G Wᵀ; a head's own part is its diagonal block of G.
            gram = sums["gram"]
            out["kv_heads.output_energy"] = ((weight_KDPH @ gram) * weight_KDPH).sum((1, 2))
            blocks = [slice(head * width, (head + 1) * width) for head in range(group)]
            energy_PK = [((weight_KDPH[..., b] @ gram[:, b, b]) * weight_KDPH[..., b]).sum((1, 2)) for b in blocks]
            out["heads.output_energy"] = torch.stack(energy_PK, dim=1).flatten()
        out |= self._removal_costs()
        return {name: value.clamp_min(0).cpu() for name, value in out.items()}

    def _removal_costs(self) -> dict[str, Tensor]:
        """The Gram matrices are used up, one after the other."""
        dims, out = self._dims, dict[str, Tensor]()
        if "ffn" in self._grams:
            gram = all_reduce_sum(self._grams.pop("ffn"))
            out["ffn.obs"] = removal_costs(gram, self._weight(self._sites.ffn, "down"), self._ridge)
        if "heads" in self._grams:
            weight = self._weight(self._sites.heads, "o")
            gram = all_reduce_sum(self._grams.pop("heads"))
            out["heads.obs"] = head_removal_costs(gram, weight, self._ridge, dims.kv_heads, dims.head_dim)
        return out

    def _hook(self, path: str, see: Callable[[Tensor], None]) -> Any:
        return self._layer.site(path).register_forward_pre_hook(lambda _module, args: see(args[0].float()))

    def _see_ffn(self, x_BSF: Tensor) -> None:
        self._add("ffn", x_BSF.abs().mean(1).square().sum(0))
        self._add("ffn_square", x_BSF.square().sum((0, 1)))
        if "ffn" in self._obs:
            self._add_gram("ffn", x_BSF)

    def _see_heads(self, x_BSQH: Tensor) -> None:
        dims = self._dims
        self._add("heads", x_BSQH.unflatten(-1, (dims.heads, dims.head_dim)).norm(dim=-1).mean(1).square().sum(0))
        x_KNG = x_BSQH.flatten(0, 1).unflatten(-1, (dims.kv_heads, -1)).transpose(0, 1)
        self._add("gram", x_KNG.transpose(1, 2) @ x_KNG)
        if "heads" in self._obs:
            self._add_gram("heads", x_BSQH)

    def _add_gram(self, name: str, x_BSU: Tensor) -> None:
        x_NU = x_BSU.flatten(0, 1)
        if name not in self._grams:
            self._grams[name] = x_NU.new_zeros(x_NU.shape[1], x_NU.shape[1])
        self._grams[name].addmm_(x_NU.T, x_NU)

    def _weight(self, path: str, role: str) -> Tensor:
        """[outputs, inputs], fp32."""
        weight = self._layer.site(path).weight
        assert isinstance(weight, Tensor)
        return weight.float().T if self._family.transposed(role) else weight.float()

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums[name] + value.double() if name in self._sums else value.double()


class NormStats:
    """Minitron's score of the hidden axis, for the norms that are attached between two calls of `close`."""

    def __init__(self, hidden: int):
        self._hidden = hidden
        self._squares: dict[int, Tensor] = {}

    def attach(self, norms: Sequence[nn.Module]) -> list[Any]:
        return [norm.register_forward_hook(lambda module, _args, output: self._see(module, output)) for norm in norms]

    def close(self) -> Tensor:
        """Σ over the norms of the root of what each saw, over the tokens of all ranks: [D] fp64 on the CPU."""
        total_D = torch.zeros(self._hidden, dtype=torch.float64)
        for squares in self._squares.values():
            total_D += all_reduce_sum(squares).sqrt().cpu()
        self._squares.clear()
        return total_D

    def _see(self, module: nn.Module, y_BSD: Tensor) -> None:
        seen = y_BSD.float().abs().mean(1).square().sum(0).double()
        self._squares[id(module)] = self._squares.get(id(module), torch.zeros_like(seen)) + seen
