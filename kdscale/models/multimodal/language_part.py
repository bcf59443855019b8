"""The language model of a checkpoint, for transformers: its config, and how its tensors are called in the files.

A checkpoint of a causal LM is that model. One of several modalities has its language model inside: it is built and
loaded as the causal LM of its family, which computes the same on text; the other tensors stay in the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from kdscale.families import Family, head_kind, load_family, nested_data
from kdscale.weights import read_config

TEXT_ALONE, WITH_IMAGES = "AutoModelForCausalLM", "AutoModelForImageTextToText"
# by what stands on the model
CLASS_OF = {
    "causal_lm": TEXT_ALONE, "masked_lm": "AutoModelForMaskedLM", "none": "AutoModel",
    "classes": "AutoModelForSequenceClassification",
}  # fmt: skip


def nested_family(path: Path) -> Family | None:
    """The family of the language model inside a model of several modalities; None for any other folder."""
    config = read_config(path)
    return load_family(config, str(path / "config.json")) if nested_data(config) is not None else None


def language_config(path: Path, trust_remote_code: bool = False) -> Any:
    """transformers' config object of the causal LM of a folder, from files alone."""
    from transformers import AutoConfig

    family = nested_family(path)
    if family is None:
        return AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code, local_files_only=True)
    fields = family.language(read_config(path))
    return AutoConfig.for_model(fields.pop("model_type"), **fields)


def loading_options(path: Path) -> dict[str, Any]:
    """What `from_pretrained` has to be told to find the language model's tensors in the files of a folder."""
    family = nested_family(path)
    if family is None:
        return {}
    names = {beginning: own for beginning, own in family.language_names.items() if beginning != own}
    return {"key_mapping": {f"^{re.escape(beginning)}": own for beginning, own in names.items()}}


def is_carried(path: Path) -> Callable[[str], bool]:
    """Whether a tensor that transformers' causal LM does not know belongs to another part of the model."""
    family = nested_family(path)
    if family is None:
        return lambda name: False
    return lambda name: family.carried(family.full_name(name))


@contextmanager
def quiet_about_other_parts(path: Path) -> Iterator[None]:
    """Keep transformers from listing the tensors of the other parts as unexpected; kdscale checks the lists itself."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    if nested_family(path) is not None:
        logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def auto_class(path: Path) -> str:
    """The name of the auto class of transformers that loads the folder as it is, all parts of it."""
    config = read_config(path)
    return CLASS_OF[head_kind(config)] if nested_data(config) is None else WITH_IMAGES


def whole_model_class(path: Path) -> Any:
    """The auto class itself."""
    import transformers

    return getattr(transformers, auto_class(path))


def path_in_whole(family: Family, path: str) -> str:
    """A module of the language model, by its path in the causal LM → in the model that `whole_model_class` loads."""
    inside = family.module_in_whole
    return path if inside is None else f"{inside}.{path.partition('.')[2]}"
