"""Scores of a mixture of experts: what each expert, and each ffn unit of each expert, adds to the sublayer's output.

transformers keeps the experts of a layer in one module with stacked weights and calls it with the tokens, the experts
that the router chose for each and their weights. What the units put out is computed here once more from those.

N tokens · n tokens of one expert · T experts a token · E experts · D hidden · F ffn of one expert
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from kdscale.models.experts import expert_units, experts_call
from kdscale.runtime.ranks import all_reduce_sum


class ExpertStats:
    """Sums over the tokens that each expert got, every one multiplied by its routing weight w:

    - `experts.output_norm` [E]: Σ w·‖expert(x)‖;
    - `ffn.output_energy` [E, F]: Σ ‖w · a_f · W_down,f‖², the unit's share of the output;
    - `ffn.activation` [E, F]: √Σ (w · a_f)². Not by sequence as in dense layers: an expert gets tokens, not sequences;
    - `ffn.expert_tokens` [E]: how many it got, no score: few are little to compensate from.
    """

    def __init__(self, experts: Any):
        self._experts = experts
        count, _, width = experts.down_proj.shape
        device = experts.down_proj.device
        self._norms_E = torch.zeros(count, dtype=torch.float64, device=device)
        self._squares_EF = torch.zeros(count, width, dtype=torch.float64, device=device)
        self._tokens_E = torch.zeros(count, dtype=torch.float64, device=device)

    def attach(self) -> Any:
        return self._experts.register_forward_pre_hook(self._see, with_kwargs=True)

    def scores(self) -> dict[str, Tensor]:
        """Over the tokens of all ranks, fp64."""
        norms_E, squares_EF = all_reduce_sum(self._norms_E), all_reduce_sum(self._squares_EF)
        columns_EF = self._experts.down_proj.float().square().sum(1).double()
        return {
            "experts.output_norm": norms_E,
            "ffn.activation": squares_EF.sqrt(),
            "ffn.expert_tokens": all_reduce_sum(self._tokens_E),
            "ffn.output_energy": squares_EF * columns_EF,
        }

    def _see(self, module: Any, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden_ND, routing = experts_call(args, kwargs)
        for expert in range(len(self._norms_E)):
            token_n, weight_n = routing.of(expert)
            if not len(token_n):
                continue
            units_nF = expert_units(module, expert, hidden_ND[token_n])
            output_nD = nn.functional.linear(units_nF, module.down_proj[expert]).float()
            self._norms_E[expert] += (output_nD.norm(dim=-1) * weight_n).sum().double()
            self._squares_EF[expert] += (units_nF.float() * weight_n[:, None]).square().sum(0).double()
            self._tokens_E[expert] += len(token_n)
