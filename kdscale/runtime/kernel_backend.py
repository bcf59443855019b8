"""Whether Triton can run the kernels on the GPUs of a job: tried before the work, and decided for all ranks alike."""

from __future__ import annotations

import os

from kdscale.config.root import Config
from kdscale.runtime.device import resolve_device
from kdscale.runtime.gpu_binding import bound_index, local_rank, visible_gpus
from kdscale.runtime.ranks import gather
from kdscale_kernels.backend import refuse_triton
from kdscale_kernels.launch_trial import launch_obstacle


def try_launch(config: Config) -> str | None:
    """What keeps Triton from launching a kernel on this rank's GPU, or None. Only the first rank of a host tries.

    The others share its compiler, headers and driver. Call it before this process uses its GPU.
    """
    number = local_rank(os.environ)
    if number or resolve_device(config.runtime.device).type != "cuda":
        return None
    return launch_obstacle(bound_index(number, visible_gpus()))


def agree_on_backend(obstacle: str | None) -> str | None:
    """Let no rank use Triton when one of them cannot: what keeps that rank from it, or None. A collective call.

    Ranks that computed with different kernels would differ in rounding and in speed, and with vocabulary slices in what
    they exchange.
    """
    reported = gather(obstacle)
    first = next((index for index, text in enumerate(reported) if text is not None), None)
    reason = None if first is None else f"rank {first}: {reported[first]}" if len(reported) > 1 else reported[first]
    refuse_triton(reason)
    return reason
