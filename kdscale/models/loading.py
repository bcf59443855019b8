"""Loads whole models and tokenizers through plain transformers.

Safetensors only; no code from the checkpoint unless the user's flag allows it; no request to the hub.
"""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Any

from kdscale.errors import CheckpointError
from kdscale.families import dropped_heads

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from kdscale.families import Family
    from kdscale.runtime.progress import Reporter
    from kdscale.weights import Checkpoint


def load_model(
    path: Path, *, dtype: torch.dtype, device: torch.device, trust_remote_code: bool = False
) -> PreTrainedModel:
    """Load a causal LM in eval mode. Raises CheckpointError when tensors are missing, unexpected or mismatched."""
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
    complaints = {key: set(info[key]) for key in ("missing_keys", "unexpected_keys", "mismatched_keys")}
    complaints["unexpected_keys"] = {
        name for name in complaints["unexpected_keys"] if not any(fnmatch.fnmatchcase(name, glob) for glob in heads)
    }
    wrong = {key: sorted(map(str, names)) for key, names in complaints.items() if names}
    if wrong:
        raise CheckpointError(f"{path} does not load cleanly", expected="every tensor exactly once", got=str(wrong))
    return model.to(device).eval()


def load_tokenizer(path: Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the checkpoint's own tokenizer. Raises CheckpointError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} has no usable tokenizer", expected="tokenizer.json", got=str(error)) from error


def open_teacher(folder: Path, reporter: Reporter | None = None) -> tuple[Checkpoint, Family]:
    """Open the teacher and its family and check the headers; reads no weights. Raises CheckpointError.

    `reporter`, if there is one, prints what of the checkpoint is left out.
    """
    from kdscale.families import load_family
    from kdscale.weights import Checkpoint

    teacher = Checkpoint.open(folder)
    family = load_family(teacher.config, str(folder / "config.json"))
    for notice in teacher.verify_against(family):
        if reporter is not None:
            reporter.say(f"  note: {notice}")
    return teacher, family
