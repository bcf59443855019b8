"""Which number formats the ranks use: agreed on, said where they are slow, and kept by what wraps a model."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from kdscale.config.distill.settings import EIGHT_BITS
from kdscale.errors import SelfCheckError
from kdscale.runtime.device import gpu_has_bf16, resolve_dtype
from kdscale.runtime.ranks import all_reduce_min
from kdscale_kernels.fused.products import gives_fp32_results


def agreed_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the weights; `auto` is bf16 only where every rank's hardware multiplies it. A collective call."""
    dtype = resolve_dtype(name, device)
    if name == "auto" and not all_reduce_min(int(dtype == torch.bfloat16)):
        return torch.float32
    return dtype


def teacher_dtype(name: str, student: torch.dtype) -> torch.dtype:
    """The dtype that distill.teacher_dtype loads the teacher in; in 8 bits it is that of all but linear maps."""
    return student if name in ("auto", *EIGHT_BITS) else getattr(torch, name)


def slow_products(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Why products take longer on this GPU than they need to, a sentence each; nothing on a CPU."""
    if device.type != "cuda":
        return []
    out = []
    if not gpu_has_bf16(device.index):
        does = "emulates bfloat16, slowly" if dtype == torch.bfloat16 else "is used in float32"
        out.append(f"{torch.cuda.get_device_name(device)} does not multiply bfloat16 in hardware: it {does}")
    if dtype == torch.bfloat16 and not gives_fp32_results():
        out.append(
            f"torch {torch.__version__} cannot multiply bfloat16 into float32 on a GPU, torch 2.8 and newer can: the "
            "head's products run in float32, several times slower"
        )
    return out


def buffer_dtypes(**models: nn.Module | None) -> dict[str, torch.dtype]:
    """The dtype of every floating-point buffer of the models, by "teacher: name"."""
    return {
        f"{whose}: {name}": buffer.dtype
        for whose, model in models.items()
        if model is not None
        for name, buffer in model.named_buffers()
        if buffer.is_floating_point()
    }


def check_buffers_kept(before: Mapping[str, torch.dtype], after: Mapping[str, torch.dtype]) -> None:
    """Check that no buffer changed its dtype: RoPE's frequencies in bf16 are wrong by radians at long positions.

    DeepSpeed up to 0.19.0 cast them. Raises SelfCheckError, naming each buffer.
    """
    changed = [name for name, dtype in before.items() if after.get(name, dtype) != dtype]
    if changed:
        raise SelfCheckError(
            f"buffers after DeepSpeed's start: {', '.join(changed)}",
            expected=", ".join(sorted({str(before[name]) for name in changed})),
            got=", ".join(sorted({str(after[name]) for name in changed})),
            hint="install another version of DeepSpeed; kdscale doctor says which one is needed",
        )
