"""A student's folder as plain transformers loads it: the whole model, all parts of it, for the self-check."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from kdscale.errors import SelfCheckError
from kdscale.families import Family
from kdscale.models.multimodal.language_part import path_in_whole, whole_model_class


def layers_on_disk(folder: Path, family: Family, device: torch.device) -> dict[str, Any]:
    """A device_map for transformers: the layers on the disk, all that is outside them on `device`."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig

    with init_empty_weights():
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
        model = whole_model_class(folder).from_config(config)
    layers = f"{path_in_whole(family, family.sites.layers)}."
    device_map: dict[str, Any] = {
        name: "disk"
        for name, _ in model.named_modules()
        if name.count(".") == layers.count(".") and name.startswith(layers)
    }
    for name, module in model.named_modules():
        own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
        if own and not name.startswith(layers):
            device_map[name] = device.type if device.index is None else device.index
    return device_map


def plain_load(folder: Path, family: Family, **settings: Any) -> Any:
    """The whole model as a user loads it, in eval mode. Raises SelfCheckError when transformers complains.

    Heads that were kept are no part of transformers' model, and may be left over.
    """
    from transformers.utils import logging

    logging.disable_progress_bar()
    loaded: Any = whole_model_class(folder).from_pretrained(
        folder, local_files_only=True, use_safetensors=True, output_loading_info=True, **settings
    )
    model, info = loaded
    info["unexpected_keys"] = {name for name in info["unexpected_keys"] if not family.kept_head(name)}
    wrong = {key: sorted(map(str, value)) for key, value in info.items() if value}
    if wrong:
        raise SelfCheckError(
            f"{folder} does not load cleanly through transformers", expected="no complaints", got=str(wrong)
        )
    return model.eval()
