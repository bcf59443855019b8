"""The teacher's K entries per row, made safe to gather, mask and scatter with.

Legend: N rows, K entries kept per row, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kdscale_kernels.types import LossOptions

# The teacher's tail mass comes from its log-sum-exp, and fp32 cannot tell a tail below this from none at all. Reverse
# KL divides by that mass, so it takes at least this much; forward KL and JSD need no floor.
TEACHER_TAIL_FLOOR = 2.0**-24


# The entries' probabilities may sum to more than one by what bf16 rounds a log-sum-exp: relative to it, or to 1.
MASS_SLACK = 2.0**-7


class TeacherEntries(NamedTuple):
    """The entries of each row, sorted by id.

    Unused slots (teacher logit -inf, or a repeated id) are False in used_NK and point at the row's first entry, so that
    writing to all slots is well defined.
    """

    ids_NK: Tensor
    used_NK: Tensor
    logp_NK: Tensor  # log-probability at temperature T (sampled: log of the weight); -inf in unused slots
    logp_tail_N: Tensor  # of everything outside the entries; -inf when the entries are the whole vocabulary
    top1_N: Tensor
    covers_vocab_N: Tensor  # True where the entries are the whole vocabulary
    ce_weight_N: Tensor | None = None  # where every row has its own, in the place of LossOptions.ce_weight

    def rows(self, index: slice) -> TeacherEntries:
        """The entries of some rows."""
        *fields, ce_weight_N = self
        rows = TeacherEntries(*(field[index] for field in fields if field is not None))
        return rows if ce_weight_N is None else rows._replace(ce_weight_N=ce_weight_N[index])

    def ce_weight(self, options: LossOptions) -> float | Tensor:
        """The rows' own [N], or the one for all."""
        return options.ce_weight if self.ce_weight_N is None else self.ce_weight_N


def prepare_entries(
    ids_NK: Tensor, logits_NK: Tensor, lse_N: Tensor, vocab: int, temperature: float, weights_NK: Tensor | None = None
) -> TeacherEntries:
    """Sort by id, drop repeats and empty slots, and temper.

    A row that no teacher gives becomes NaN, without a wait for the device: one without any entry, with a logit or
    log-sum-exp that is infinite, with two logits for one id, or with entries of more mass than one.

    lse_N is logsumexp(z / temperature) over the teacher's vocabulary. With weights_NK (sampled targets) they stand in
    for the probabilities, those of a repeated id are added up, and there is no tail.
    """
    empty_NK = logits_NK == float("-inf")  # not isfinite: a NaN must stay and poison its row
    keys_NK, order_NK = torch.sort(ids_NK.masked_fill(empty_NK, torch.iinfo(torch.int64).max), dim=1, stable=True)
    logits_NK = logits_NK.gather(1, order_NK)
    used_NK = ~empty_NK.gather(1, order_NK)
    repeat_NK = keys_NK[:, 1:] == keys_NK[:, :-1]
    used_NK[:, 1:] &= ~repeat_NK
    none_N = ~used_NK[:, 0]
    broken_N = none_N | (logits_NK == float("inf")).any(1) | ~lse_N.isfinite()
    if weights_NK is None:
        broken_N |= (repeat_NK & (logits_NK[:, 1:] != logits_NK[:, :-1])).any(1)
    first_N1 = keys_NK[:, :1].masked_fill(none_N[:, None], 0)
    ids_NK = torch.where(used_NK, keys_NK, first_N1)
    logits_NK = logits_NK.masked_fill(~used_NK, float("-inf"))
    top1_N = ids_NK.gather(1, logits_NK.argmax(1, keepdim=True))[:, 0]
    logp_NK = logits_NK / temperature - lse_N.masked_fill(broken_N, float("nan"))[:, None]
    # log(1 - mass) from the log of the mass; rounding may put it a hair above zero, which means no tail.
    log_mass_N = torch.logsumexp(logp_NK, 1)
    logp_tail_N = torch.log(-torch.expm1(log_mass_N.clamp(max=0.0)))
    above_one_N = log_mass_N > MASS_SLACK * lse_N.abs().clamp(min=1.0)
    logp_NK = logp_NK.masked_fill(above_one_N[:, None], float("nan"))
    covers_vocab_N = used_NK.sum(1) >= vocab
    if weights_NK is not None:
        weights_NK = sum_repeats(keys_NK, weights_NK.gather(1, order_NK))
        logp_NK = weights_NK.masked_fill(broken_N[:, None], float("nan")).log().masked_fill(~used_NK, float("-inf"))
        logp_tail_N = torch.full_like(logp_tail_N, float("-inf"))
    return TeacherEntries(
        ids_NK, used_NK, logp_NK, logp_tail_N.masked_fill(covers_vocab_N, float("-inf")), top1_N, covers_vocab_N
    )


def sum_repeats(keys_NK: Tensor, weights_NK: Tensor) -> Tensor:
    """At the first of each run of equal keys (sorted), the sum of its weights, always added in one order: no atomics.

    After a step of width w each slot holds the sum of the next 2·w slots that share its key.
    """
    width = 1
    while width < keys_NK.shape[1]:
        same_NK = keys_NK[:, width:] == keys_NK[:, :-width]
        shifted_NK = weights_NK[:, width:].masked_fill(~same_NK, 0.0)
        weights_NK = torch.cat([weights_NK[:, :-width] + shifted_NK, weights_NK[:, -width:]], 1)
        width *= 2
    return weights_NK
