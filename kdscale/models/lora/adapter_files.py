"""A LoRA adapter as peft writes it: adapter_config.json and adapter_model.safetensors.

Only what changes weights in a way that is known here is read; everything else is refused by name, so that no adapter
is merged in part. Nothing is unpickled and no class of the adapter's is imported.

r rank · I inputs · O outputs · V vocabulary · H hidden
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kdscale.errors import CheckpointError, ConfigError
from kdscale.files import read_json
from kdscale.weights.header import TensorEntry, read_header
from kdscale.weights.unreadable import ADAPTER_CONFIG, listed

WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (ADAPTER_CONFIG, WEIGHTS_FILE)
NAME_PREFIX = "base_model.model."  # of every name in the file
_PLAIN = re.compile(r"\^?[\w.]+")  # a key of alpha_pattern that is a name, and no regular expression
# Settings that change what the weights are, and that are not merged here: field → why.
_REFUSED = {
    "use_qalora": "QALoRA pools the inputs of quantised layers",
    "alora_invocation_tokens": "an activated LoRA acts after certain tokens only",
    "layer_replication": "it repeats layers of the base model",
    "target_parameters": "it adapts parameters that are no module's weight",
    "trainable_token_indices": "it replaces single rows of the embedding",
    "use_bdlora": "its matrices are block-diagonal",
    "arrow_config": "it routes each token to adapters",
    "velora_config": "it is not a LoRA of fixed matrices",
    "monteclora_config": "its matrices are drawn at random",
    "lora_bias": "its B has a bias of its own",
}
# Ways to begin that change the base model's own weights: what is saved fits only the base model that they made.
_CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

Kind = Literal["linear", "embedding"]


@dataclass
class LowRank:
    """What one adapter adds to one weight: names in its file; `scaling` multiplies the product of the two matrices."""

    kind: Kind
    module: str
    scaling: float = 0.0
    a: str = ""  # [r, I], or [r, V] of an embedding
    b: str = ""  # [O, r], or [H, r]
    magnitude: str | None = None  # [O], with DoRA
    transposed: bool = False  # the weight is stored [I, O]


@dataclass(frozen=True)
class Adapter:
    """An opened adapter: what it adds to each module's weight, and the tensors that it replaces as a whole."""

    folder: Path
    entries: dict[str, TensorEntry]
    low_rank: dict[str, LowRank] = field(default_factory=dict)  # module of the base model → what is added to its weight
    replaced: dict[str, str] = field(default_factory=dict)  # tensor of the base model → its name in the adapter's file

    @property
    def rank(self) -> str:
        """The rank, or the smallest and the largest of them."""
        ranks = sorted({self.entries[part.a].shape[0] for part in self.low_rank.values()})
        return "0" if not ranks else str(ranks[0]) if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"


def open_adapter(folder: Path) -> Adapter:
    """Read an adapter's settings and headers, no weights.

    Raises ConfigError for a folder that is not there, CheckpointError for one that is no LoRA adapter, for settings
    that cannot be merged exactly, and for tensors that fit nothing.
    """
    if not folder.is_dir():
        raise ConfigError("teacher.adapters", expected="a folder with " + " and ".join(ADAPTER_FILES), got=str(folder))
    if not (folder / ADAPTER_CONFIG).is_file():
        hint = "this is a whole model: give it as teacher.path" if (folder / "config.json").is_file() else None
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG} is missing", expected="an adapter as peft saves it", hint=hint
        )
    if not (folder / WEIGHTS_FILE).is_file():
        hint = None
        if (folder / "adapter_model.bin").is_file():
            hint = "a pickle is never opened: load the adapter with peft and save it again with safetensors"
        raise CheckpointError(f"{folder / WEIGHTS_FILE} is missing", expected="the adapter's weights", hint=hint)
    config = read_json(folder / ADAPTER_CONFIG, CheckpointError, expect=dict)
    _check_settings(config, folder / ADAPTER_CONFIG)
    return _sorted_out(folder, config, read_header(folder / WEIGHTS_FILE))


def _check_settings(config: dict[str, Any], where: Path) -> None:
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{where}: peft_type", expected='"LORA"', got=repr(config.get("peft_type"))[:100])
    for name, why in _REFUSED.items():
        if config.get(name):
            hint = "merge it with peft (merge_and_unload), save the model and give that as teacher.path"
            raise CheckpointError(f"{where}: {name}", expected="a LoRA without it", got=why, hint=hint)
    start = config.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower().startswith(_CHANGES_BASE):
        raise CheckpointError(
            f"{where}: init_lora_weights", expected="an adapter that leaves the base model's weights as they are",
            got=f"{start!r}, which changes them at the start",
            hint="convert it with peft (save_pretrained with path_initial_model_for_weight_conversion)",
        )  # fmt: skip
    for name in ("use_rslora", "use_dora", "fan_in_fan_out"):
        if not isinstance(config.get(name, False), bool):
            raise CheckpointError(f"{where}: {name}", expected="true or false", got=repr(config[name])[:100])


def _sorted_out(folder: Path, config: dict[str, Any], entries: dict[str, TensorEntry]) -> Adapter:
    """Tell apart what each tensor of the file is. Raises CheckpointError for one that is nothing known."""
    adapter, unknown = Adapter(folder, entries), []
    parts = {
        ".lora_A.weight": ("linear", "a"), ".lora_B.weight": ("linear", "b"),
        ".lora_embedding_A": ("embedding", "a"), ".lora_embedding_B": ("embedding", "b"),
        ".lora_magnitude_vector": ("linear", "magnitude"), ".lora_magnitude_vector.weight": ("linear", "magnitude"),
    }  # fmt: skip
    for name in entries:
        plain = name.removeprefix(NAME_PREFIX)
        suffix = next((suffix for suffix in parts if plain.endswith(suffix)), None)
        if not name.startswith(NAME_PREFIX) or (suffix is None and "lora_" in plain):
            unknown.append(name)
        elif suffix is None:
            adapter.replaced[plain.replace(".modules_to_save.", ".").replace(".base_layer.", ".")] = name
        else:
            kind, part = parts[suffix]
            module = plain.removesuffix(suffix)
            of_module = adapter.low_rank.setdefault(module, LowRank("linear", module))
            setattr(of_module, part, name)
            if kind == "embedding":
                of_module.kind = "embedding"
    for added in adapter.low_rank.values():
        if not added.a or not added.b or (added.kind == "embedding" and added.magnitude):
            unknown.append(f"{added.module} (its A, B or magnitude)")
        else:
            _complete(added, config, entries, folder)
    if unknown or not entries:
        raise CheckpointError(
            f"{folder / WEIGHTS_FILE}", expected="lora_A and lora_B of modules, and whole modules",
            got=listed(unknown) or "no tensors", hint="merge it with peft and give the merged model",
        )  # fmt: skip
    return adapter


def _complete(part: LowRank, config: dict[str, Any], entries: dict[str, TensorEntry], folder: Path) -> None:
    """Fill in scaling and layout. Raises CheckpointError where shapes or settings contradict each other."""
    a, b = entries[part.a].shape, entries[part.b].shape
    if len(a) != 2 or len(b) != 2 or a[0] != b[1] or a[0] < 1:
        got = f"{list(a)} and {list(b)}"
        raise CheckpointError(f"{folder / WEIGHTS_FILE}: {part.module}", expected="A [r, I] and B [O, r]", got=got)
    if bool(config.get("use_dora", False)) != (part.magnitude is not None):
        got = "a magnitude" if part.magnitude else "no magnitude"
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: use_dora of {part.module}", expected="as the weights", got=got
        )
    alpha = _of_module(config, "alpha_pattern", "lora_alpha", part.module, folder)
    rank = _of_module(config, "rank_pattern", "r", part.module, folder)
    if rank != a[0]:
        where = f"{folder / ADAPTER_CONFIG}: r of {part.module}"
        raise CheckpointError(where, expected=f"{a[0]}, as its weights have", got=str(rank))
    part.scaling = alpha / (math.sqrt(rank) if config.get("use_rslora", False) else rank)
    part.transposed = part.kind == "linear" and bool(config.get("fan_in_fan_out", False))


def _of_module(config: dict[str, Any], patterns: str, default: str, module: str, folder: Path) -> float:
    """A number of one module: its own in `patterns` (by the end of its name, as peft matches it), else `default`."""
    values = config.get(patterns) or {}
    if not isinstance(values, dict):
        raise CheckpointError(f"{folder / ADAPTER_CONFIG}: {patterns}", expected="an object", got=repr(values)[:100])
    value: Any = config.get(default)
    for pattern, own in values.items():
        if not _PLAIN.fullmatch(pattern):
            raise CheckpointError(
                f"{folder / ADAPTER_CONFIG}: {patterns}", expected="names of modules",
                got=f"the pattern {pattern[:100]!r}", hint="write the modules out, or merge the adapter with peft",
            )  # fmt: skip
        name = pattern.removeprefix("^")
        if module == name or (not pattern.startswith("^") and module.endswith(f".{name}")):
            value = own
            break
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1e9:
        raise CheckpointError(
            f"{folder / ADAPTER_CONFIG}: {default}", expected="a positive number", got=repr(value)[:100]
        )
    return value
