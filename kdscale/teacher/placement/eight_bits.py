"""A teacher whose layers' linear maps are kept in 8 bits, in about half of bf16's memory, also while it loads.

`float8` (E4M3): every row of a weight (an output unit) and every row of what it reads (a token) has a scale of its own,
so that the largest value of each row is the largest that E4M3 holds; both are multiplied in 8 bits and added up in
fp32, at twice the FLOP/s of bf16. Rows with scales of their own are what torch's `_scaled_mm` multiplies on compute
capability 8.9 and newer; on a CPU it computes the same, slowly.

`int8`: weights alone are rounded, to integers with a scale a row (weights.integer_grid); what they read keeps its
dtype, and a weight becomes its dtype again for the length of its product. Any device does it, no faster than bf16.

Embedding, head, norms, attention, routers and the experts of a mixture keep their dtype. Weights are read and rounded
one after the other, so that a teacher that does not fit in its own dtype can be loaded.

R rows (tokens) of a product, K its inputs, N its outputs; N rows of a sample, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from kdscale.config.distill.settings import EIGHT_BITS
from kdscale.errors import CheckpointError, ConfigError
from kdscale.models.compiling import decoder_layers, uncompiled
from kdscale.models.head import final_hidden, head_of
from kdscale.models.layer_stream import LayerStream
from kdscale.models.parameter_map import ParameterReader
from kdscale.models.skeleton import build_skeleton, move_buffers, replace_parameters
from kdscale.teacher.source import MicroBatch
from kdscale.weights.integer_grid import IntegerGrid

_E4M3 = torch.float8_e4m3fn
_LARGEST = torch.finfo(_E4M3).max
_MULTIPLE = 16  # of K and N, that the kernels of float8 ask for
_INT8 = IntegerGrid(8)


@dataclass(frozen=True)
class RoundingError:
    """What 8 bits changed: the share of the parameters, and teacher beside teacher on `positions` positions of text.

    `divergence` is the mean forward KL in nats, `agreement` how often the most likely token is the same.
    """

    name: str
    share: float
    divergence: float
    agreement: float
    positions: int

    def in_words(self) -> str:
        """For the log."""
        return (
            f"teacher in {self.name}: {self.share:.0%} of its parameters; beside its own dtype a KL of "
            f"{self.divergence:.2g} nats, and the same most likely token at {self.agreement:.1%} of {self.positions} "
            "held-out positions"
        )


def rows_in_float8(x_RK: Tensor) -> tuple[Tensor, Tensor]:
    """(x / scale rounded to E4M3, the scales [R, 1] in fp32)."""
    x_RK = x_RK.float()
    scale_R1 = x_RK.abs().amax(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny * _LARGEST) / _LARGEST
    return (x_RK / scale_R1).clamp(-_LARGEST, _LARGEST).to(_E4M3), scale_R1


class EightBitLinear(nn.Module):
    """In the place of a frozen nn.Linear; `weight` has a byte a value, `scale_1N` is fp32, the bias stays as it is."""

    multiple = 1  # of K and N

    def __init__(self, linear: nn.Linear):
        super().__init__()
        weight_NK, scale_N1 = self._rounded(linear.weight.detach())
        self.weight = nn.Parameter(weight_NK, requires_grad=False)
        self.bias = linear.bias
        self.scale_1N: Tensor
        self.register_buffer("scale_1N", scale_N1.T.contiguous(), persistent=False)

    @staticmethod
    def _rounded(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        """(the weight in 8 bits, a scale [N, 1] for each row in fp32)."""
        raise NotImplementedError


class Float8Linear(EightBitLinear):
    """Multiplies E4M3 with E4M3. A row that is not finite gives a row that is not finite."""

    multiple = _MULTIPLE

    @staticmethod
    def _rounded(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        return rows_in_float8(weight_NK)

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] from [..., K], in the dtype of `x`; the product is rounded to bf16, as the kernels do."""
        x_RK, scale_R1 = rows_in_float8(x.flatten(0, -2))
        out_RN = torch._scaled_mm(
            x_RK, self.weight.T, scale_a=scale_R1, scale_b=self.scale_1N, out_dtype=torch.bfloat16
        )  # fmt: skip
        out = out_RN.to(x.dtype).view(*x.shape[:-1], -1)
        return out if self.bias is None else out + self.bias


class Int8Linear(EightBitLinear):
    """Multiplies with the integers, which bf16 and fp32 have exactly, and scales the outputs."""

    @staticmethod
    def _rounded(weight_NK: Tensor) -> tuple[Tensor, Tensor]:
        scales_N1 = _INT8.scales(weight_NK.float())
        return _INT8.integers(weight_NK, scales_N1).to(torch.int8), scales_N1

    def forward(self, x: Tensor) -> Tensor:
        """[..., N] from [..., K], in the dtype of `x`."""
        out = (nn.functional.linear(x, self.weight.to(x.dtype)).float() * self.scale_1N).to(x.dtype)
        return out if self.bias is None else out + self.bias


KINDS: dict[str, type[EightBitLinear]] = {"float8": Float8Linear, "int8": Int8Linear}
assert set(KINDS) == set(EIGHT_BITS)


def load_in_eight_bits(
    path: Path, name: str, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> Any:
    """The causal LM at `path` with the linear maps of its layers as KINDS[name] and all else in `dtype`.

    One weight at a time is there in `dtype`. Raises ConfigError for a model that has no such maps, or that cannot be
    loaded in parts.
    """
    try:
        weights = ParameterReader.open(path)
        model = build_skeleton(weights, dtype=dtype, trust_remote_code=trust_remote_code)
    except CheckpointError as error:
        raise ConfigError(
            f"distill.teacher_dtype: {name}",
            expected="a teacher that can be loaded in parts: float weights of a family kdscale knows",
            got=f"{error.what}: {error.got}" if error.got else error.what,
            hint="teacher_dtype: bfloat16 loads whatever transformers loads",
        ) from error

    def read(parameter_name: str, parameter: Tensor) -> nn.Parameter:
        flat = torch.empty(parameter.numel(), dtype=dtype, device=device)
        weights.fill(parameter_name, 0, flat)
        return nn.Parameter(flat.view(parameter.shape), requires_grad=False)

    round_linears(model, name, read)
    names = {id(value): parameter_name for parameter_name, value in model.named_parameters()}
    replace_parameters(model, lambda value: read(names[id(value)], value) if value.is_meta else value)
    move_buffers(model, device)
    return model


def round_linears(model: nn.Module, name: str, read: Callable[[str, torch.Tensor], nn.Parameter]) -> None:
    """Put KINDS[name] in the place of the linears of the model's layers, whose weights `read` gives, one at a time.

    Raises ConfigError for a model that has none that fit.
    """
    kind, names = KINDS[name], {id(value): parameter for parameter, value in model.named_parameters()}
    found = False
    for layer in decoder_layers(model):
        for parent in list(layer.modules()):
            for child_name, child in list(parent.named_children()):
                if type(child) is nn.Linear and not any(size % kind.multiple for size in child.weight.shape):
                    child.weight = read(names[id(child.weight)], child.weight)
                    setattr(parent, child_name, kind(child))
                    found = True
    if not found:
        raise ConfigError(
            "distill.teacher_dtype", expected=f"a teacher with linear layers of multiples of {kind.multiple}",
            got=type(model).__name__, hint="teacher_dtype: bfloat16",
        )  # fmt: skip


def rounding_error(path: Path, name: str, model: Any, sample: MicroBatch) -> RoundingError:
    """Compare a teacher in 8 bits with the one in the files at `path`, of which one layer is in memory at a time."""
    with uncompiled(), torch.no_grad():  # these shapes come only here
        exact_NV = _exact(path, head_of(model).weight_VH.dtype, sample).log_softmax(-1)
        hidden_BSH = final_hidden(model, sample.input_ids_BS, sample.position_ids_BS, sample.documents)
        rounded_NV = head_of(model).logits(hidden_BSH.flatten(0, 1).index_select(0, sample.rows_N)).log_softmax(-1)
    divergence = (exact_NV.exp() * (exact_NV - rounded_NV)).sum(-1).mean()
    agreement = (exact_NV.argmax(-1) == rounded_NV.argmax(-1)).float().mean()
    changed = sum(module.weight.numel() for module in model.modules() if isinstance(module, EightBitLinear))
    share = changed / sum(value.numel() for value in model.parameters())
    return RoundingError(name, share, float(divergence), float(agreement), sample.rows)


def _exact(path: Path, dtype: torch.dtype, sample: MicroBatch) -> Tensor:
    """The logits [N, V] of the rows of the sample, fp32."""
    weights = ParameterReader.open(path)
    checkpoint, device = weights.checkpoint, sample.input_ids_BS.device
    stream = LayerStream(checkpoint.config, weights.family, checkpoint.tensor, dtype=dtype, device=device)
    hidden_BSH = stream.embedding()(sample.input_ids_BS, sample.position_ids_BS)
    for layer in stream.layers():
        hidden_BSH = layer(hidden_BSH, sample.position_ids_BS)
    hidden_BSH = stream.stream(hidden_BSH)
    return stream.head()(stream.final_norm()(hidden_BSH).flatten(0, 1).index_select(0, sample.rows_N))


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


def check_eight_bits(name: str, device: torch.device) -> None:
    """Raise ConfigError for a value of distill.teacher_dtype that this device cannot multiply; any can do int8."""
    if name == "float8" and (obstacle := float8_obstacle(device)) is not None:
        raise ConfigError(
            "distill.teacher_dtype",
            expected="for float8 an NVIDIA GPU of compute capability 8.9 or newer (L4, L40S, RTX 4090, H100, B200)",
            got=obstacle,
            hint="teacher_dtype: int8, which any device can; or bfloat16, and teacher_placement: partitioned or "
            "offloaded where memory is short",
        )
