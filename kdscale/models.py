"""Loading whole models and tokenizers through plain transformers, and the device and dtype they run in.

Safetensors only, no code from the checkpoint unless the user's flag says so, no hub unless the user named a hub id.
"""

from __future__ import annotations

import fnmatch
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kdscale.errors import CheckpointError, ConfigError
from kdscale.families import dropped_heads

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def resolve_device(name: str) -> torch.device:
    """`auto` is CUDA where there is one. Raises ConfigError when CUDA was asked for and is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "runtime.device", expected="cuda", got="no CUDA device", hint="use auto, or run kdscale doctor"
        )
    return torch.device(name)


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; elsewhere bf16 is emulated and slower than fp32."""
    capability = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    if capability:
        return bool(capability.get("avx512_bf16") or capability.get("amx_bf16") or capability.get("bf16"))
    try:
        flags = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto` is bf16 wherever the hardware multiplies it, else fp32."""
    if name == "auto":
        good = torch.cuda.is_bf16_supported() if device.type == "cuda" else cpu_has_bf16()
        return torch.bfloat16 if good else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[name]


def set_threads(threads: int | None, processes: int = 1) -> int:
    """CPU threads of this process: as asked, else the usable cores shared out over `processes`; returns the number."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    count = threads or max(1, cores // processes)
    torch.set_num_threads(count)
    return count


def load_model(
    path: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """A whole causal LM in eval mode. Raises CheckpointError when tensors are missing, unexpected or mismatched."""
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        path,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    model, info = loaded
    heads = dropped_heads(model.config.model_type)  # neither transformers' model nor the student has them
    found = {key: set(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    found["unexpected_keys"] = {
        name for name in found["unexpected_keys"] if not any(fnmatch.fnmatchcase(name, glob) for glob in heads)
    }
    wrong = {key: sorted(map(str, names)) for key, names in found.items() if names}
    if wrong:
        raise CheckpointError(f"{path} does not load cleanly", expected="every tensor exactly once", got=str(wrong))
    return model.to(device).eval()


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer. Raises CheckpointError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} has no usable tokenizer", expected="tokenizer.json", got=str(error)) from error
