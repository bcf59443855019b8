"""Whether the compiled kernels run on the hosts of a job: tried before the work, and decided for all ranks alike.

The same for torch.compile, whose code is Triton's on a GPU and C++ on a CPU.
"""

from __future__ import annotations

import os
from typing import Literal

import torch

from kdscale.config.root import Config
from kdscale.errors import ConfigError
from kdscale.runtime.device import resolve_device, resolve_dtype
from kdscale.runtime.gpu_binding import bound_index, local_rank, visible_gpus
from kdscale.runtime.ranks import gather
from kdscale_kernels.backend import refuse_compiled
from kdscale_kernels.c_kernels.library import library_obstacle
from kdscale_kernels.launch_trial import launch_obstacle


def try_launch(config: Config) -> str | None:
    """What keeps Triton from launching a kernel on this rank's GPU, or C from being compiled for its CPU, or None.

    Only the first rank of a host tries: the others share its compiler, headers and driver. On a CPU only bf16 weights
    have kernels in C. Call it before this process uses its GPU.
    """
    number, device = local_rank(os.environ), resolve_device(config.runtime.device)
    if number:
        return None
    if device.type == "cuda":
        return launch_obstacle(bound_index(number, visible_gpus()))
    return library_obstacle() if resolve_dtype(config.distill.dtype, device) == torch.bfloat16 else None


def agree_on_backend(obstacle: str | None) -> str | None:
    """Let no rank use compiled kernels when one cannot: what keeps that rank from it, or None. A collective call.

    Ranks that computed with different kernels would differ in rounding and in speed, and with vocabulary slices in what
    they exchange.
    """
    reason = _of_any_rank(obstacle)
    refuse_compiled(reason)
    return reason


def agree_on_compiling(
    choice: Literal["auto", "off", "layers"], device: torch.device, triton_obstacle: str | None
) -> tuple[bool, str | None]:
    """(whether distill.compile: `choice` compiles layers on `device`, what keeps `auto` from it). A collective call.

    `triton_obstacle` is what `agree_on_backend` returned. Raises ConfigError where `layers` was asked for and some rank
    cannot compile.
    """
    if choice == "off" or (choice == "auto" and device.type != "cuda"):
        return False, None
    if device.type == "cuda":
        obstacle = triton_obstacle
    else:
        obstacle = _of_any_rank(None if local_rank(os.environ) else _compiler_obstacle())
    if obstacle is not None and choice == "layers":
        raise ConfigError(
            "distill.compile", expected="a machine that can run what torch.compile makes", got=obstacle,
            hint="mend that, or set distill.compile: off",
        )  # fmt: skip
    return obstacle is None, obstacle


def _compiler_obstacle() -> str | None:
    """What keeps torch.compile from working on this CPU, tried with a sum; None when it works."""
    try:
        torch.compile(lambda x: x.sin() + 1.0, dynamic=False)(torch.zeros(8))
    except Exception as error:  # noqa: BLE001 - the libraries and the compiler raise what they like
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None


def _of_any_rank(obstacle: str | None) -> str | None:
    """The first obstacle that a rank has, with the rank's number where there are several. A collective call."""
    reported = gather(obstacle)
    first = next((index for index, text in enumerate(reported) if text is not None), None)
    return None if first is None else f"rank {first}: {reported[first]}" if len(reported) > 1 else reported[first]
