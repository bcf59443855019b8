"""What each expert of a mixture, and each ffn unit of each expert, adds to the sublayer's output.

transformers keeps the experts of a layer in one module with stacked weights and calls it with the tokens, the experts
that the router chose for each token and their weights. The units' outputs are computed here once more from those.

N tokens · n tokens of one expert · E experts · D hidden · F ffn units of one expert
"""

from __future__ import annotations

from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from kdscale.models.experts import down_weight, expert_output, expert_units, experts_call, weighed
from kdscale.runtime.ranks import all_reduce_sum


class ExpertSums:
    """Sums over the tokens that each expert gets, fp64 and over all ranks; read them when all tokens have run.

    Unlike in dense layers nothing is averaged over a sequence: an expert gets tokens, not sequences.
    """

    def __init__(self, experts: Any):
        self._experts = experts
        count, (_, width) = len(experts.down_proj), down_weight(experts, 0).shape
        device = experts.down_proj.device
        self._norms_E = torch.zeros(count, dtype=torch.float64, device=device)
        self._squares_EF = torch.zeros(count, width, dtype=torch.float64, device=device)
        self._tokens_E = torch.zeros(count, dtype=torch.float64, device=device)
        experts.register_forward_pre_hook(self._add, with_kwargs=True)

    @cached_property
    def norms_E(self) -> Tensor:  # noqa: N802
        """Σ routing weight · ‖expert output‖."""
        return all_reduce_sum(self._norms_E)

    @cached_property
    def squares_EF(self) -> Tensor:  # noqa: N802
        """Σ (routing weight · unit)², over the inputs of the expert's down projection."""
        return all_reduce_sum(self._squares_EF)

    @cached_property
    def tokens_E(self) -> Tensor:  # noqa: N802
        """How many tokens the expert got."""
        return all_reduce_sum(self._tokens_E)

    @property
    def columns_EF(self) -> Tensor:  # noqa: N802
        """Squared norms of the columns of each expert's down projection."""
        weights = (down_weight(self._experts, expert) for expert in range(len(self._norms_E)))
        return torch.stack([weight_DF.float().square().sum(0).double() for weight_DF in weights])

    def _add(self, module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden_ND, routing = experts_call(args, kwargs)
        for expert in range(len(self._norms_E)):
            token_n, read_nD, weight_n = weighed(module, hidden_ND, routing, expert)
            if not len(token_n):
                continue
            units_nF = expert_units(module, expert, read_nD)
            output_nD = expert_output(module, expert, units_nF).float()
            self._norms_E[expert] += (output_nD.norm(dim=-1) * weight_n).sum().double()
            self._squares_EF[expert] += (units_nF.float() * weight_n[:, None]).square().sum(0).double()
            self._tokens_E[expert] += len(token_n)
