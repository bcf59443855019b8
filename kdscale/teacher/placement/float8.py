"""A teacher whose layers multiply in 8 bits (float8 E4M3): half the weights' bytes, and twice the FLOP/s of bf16.

Every row of a weight (an output unit) and every row of what it reads (a token) has a scale of its own, so that the
largest value of each row is the largest that E4M3 holds; the products are added up in fp32. Embedding, head, norms,
attention, routers and the experts of a mixture keep their dtype. Rows with scales of their own are what torch's
`_scaled_mm` multiplies on compute capability 8.9 and newer; on a CPU it computes the same, slowly.

R rows (tokens) of a product, K its inputs, N its outputs; N rows of a sample, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdscale.errors import ConfigError
from kdscale.models.compiling import decoder_layers, uncompiled
from kdscale.models.head import final_hidden, head_of
from kdscale.teacher.source import MicroBatch

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_MULTIPLE = 16  # of K and N, that the kernels ask for


@dataclass(frozen=True)
class Float8Error:
    """What 8 bits changed: the share of the parameters, and teacher beside teacher on `positions` positions of text.

    `divergence` is the mean forward KL in nats, `agreement` how often the most likely token is the same.
    """

    share: float
    divergence: float
    agreement: float
    positions: int

    def in_words(self) -> str:
        """For the log."""
        return (
            f"teacher in float8: {self.share:.0%} of its parameters; beside its own dtype a KL of "
            f"{self.divergence:.2g} nats, and the same most likely token at {self.agreement:.1%} of {self.positions} "
            "held-out positions"
        )


def rows_in_float8(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """(x / scale rounded to E4M3, the scales [R, 1] in fp32)."""
    x_RK = x_RK.float()
    scale_R1 = x_RK.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * _LARGEST) / _LARGEST
    return (x_RK / scale_R1).clamp(-_LARGEST, _LARGEST).to(_E4M3), scale_R1


class Float8Linear(nn.Module):
    """In the place of a frozen nn.Linear. A row that is not finite gives a row that is not finite."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight_NK, scale_N1 = rows_in_float8(linear.weight.detach())
        self.weight = nn.Parameter(weight_NK, requires_grad=False)
        self.bias = linear.bias
        self.scale_1N: Tensor
        self.register_buffer("scale_1N", scale_N1.T.contiguous(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] from [..., K], in the dtype of `x`; the product is rounded to bf16, as the kernels do."""
        x_RK, scale_R1 = rows_in_float8(x.flatten(0, -2))
        out_RN = torch._scaled_mm(
            x_RK, self.weight.T, scale_a=scale_R1, scale_b=self.scale_1N, out_dtype=torch.bfloat16
        )  # fmt: skip
        out = out_RN.to(x.dtype).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


def to_float8(teacher: nn.Module, sample: MicroBatch) -> Float8Error:
    """Change the linears of the teacher's layers, and measure what that changed on the rows of `sample`.

    Raises ConfigError for a model that has none that fit.
    """
    with uncompiled():  # these shapes come only here
        before_NV = _log_shares(teacher, sample)
        share = _quantise(teacher)
        after_NV = _log_shares(teacher, sample)
    divergence = (before_NV.exp() * (before_NV - after_NV)).sum(-1).mean()
    agreement = (before_NV.argmax(-1) == after_NV.argmax(-1)).float().mean()
    return Float8Error(share, float(divergence), float(agreement), sample.rows)


def _quantise(teacher: nn.Module) -> float:
    """Replace the linears, one after the other; returns their share of the parameters."""
    total, changed = sum(value.numel() for value in teacher.parameters()), 0
    for layer in decoder_layers(teacher):
        for parent in list(layer.modules()):
            for name, child in list(parent.named_children()):
                if type(child) is nn.Linear and not any(size % _MULTIPLE for size in child.weight.shape):
                    changed += child.weight.numel()
                    setattr(parent, name, Float8Linear(child))
    if not changed:
        raise ConfigError(
            "distill.teacher_dtype", expected=f"a teacher with linear layers of multiples of {_MULTIPLE}",
            got=type(teacher).__name__, hint="teacher_dtype: bfloat16",
        )  # fmt: skip
    return changed / total


@torch.no_grad()
def _log_shares(model: Any, sample: MicroBatch) -> Tensor:
    """Log probabilities of every token in every row of the sample, [N, V] in fp32."""
    hidden_BSH = final_hidden(model, sample.input_ids_BS, sample.position_ids_BS, sample.documents)
    return head_of(model).logits(hidden_BSH.flatten(0, 1).index_select(0, sample.rows_N)).log_softmax(-1)


def float8_obstacle(device: torch.device) -> str | None:
    """What keeps this device from multiplying rows of float8, tried with a few; None when it can."""
    if device.type != "cuda":
        return f"a {device.type.upper()}"
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if torch.version.hip or capability < (8, 9):
        return f"{name}, which has none"
    try:
        linear = nn.Linear(32, 32, device=device, dtype=torch.bfloat16)
        Float8Linear(linear)(torch.ones(32, 32, device=device, dtype=torch.bfloat16)).sum().item()
    except RuntimeError as error:
        return f"{name} with torch {torch.__version__}: {' '.join(str(error).split())[:200]}"
    return None


def check_float8(device: torch.device) -> None:
    """Raise ConfigError where `float8_obstacle` finds one."""
    if (obstacle := float8_obstacle(device)) is not None:
        raise ConfigError(
            "distill.teacher_dtype",
            expected="for float8 an NVIDIA GPU of compute capability 8.9 or newer (L4, L40S, RTX 4090, H100, B200)",
            got=obstacle,
            hint="teacher_dtype: bfloat16, and teacher_placement: partitioned or offloaded where memory is short",
        )
