"""Look at a folder or a GGUF file and say what it is. Nothing of it is run, unpickled or changed.

What is wrong with it ends in the list `problems`, one sentence each; only a path that holds no model is an error.
"""

from __future__ import annotations

import fnmatch
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdscale.errors import CheckpointError, ConfigError, KdscaleError
from kdscale.families import Dims, Family, dropped_heads, load_family, nested_data
from kdscale.jobs.inspection.cuts import what_can_be_cut
from kdscale.weights import Checkpoint, check_tokenizer, config_on_disk, quantised_notice
from kdscale.weights.quantised import without_quantisation
from kdscale.weights.unreadable import ADAPTER_CONFIG

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
LANGUAGE = "language model"


def inspect_path(path: Path) -> dict[str, Any]:
    """Everything that can be said of the model at `path`, as plain values.

    Keys: `path`, `kind` (checkpoint, adapter or gguf), and where they are known `model_type`, `architectures`,
    `family`, `nested`, `sizes`, `parameters`, `parts`, `weights`, `quantization`, `tied`, `context`, `tokenizer`,
    `own_code`, `adapter`, `axes`, `cuts`, `notes`, `problems`. Raises ConfigError for a path that is
    not there, CheckpointError for one that holds no model.
    """
    if path.is_file() and path.suffix == ".gguf":
        from kdscale.jobs.inspection.gguf_file import inspect_gguf

        return inspect_gguf(path)
    if not path.is_dir():
        got = "a file" if path.is_file() else "no such path"
        raise ConfigError(f"{path}", expected="a model's folder, or a .gguf file", got=got)
    if (path / ADAPTER_CONFIG).is_file() and not (path / "config.json").is_file():
        return _adapter(path)
    return _checkpoint(path)


def _checkpoint(path: Path) -> dict[str, Any]:
    config = config_on_disk(path)
    facts: dict[str, Any] = {
        "path": str(path), "kind": "checkpoint", "model_type": config.get("model_type"),
        "architectures": config.get("architectures"), "notes": [], "problems": [],
    }  # fmt: skip
    if config.get("quantization_config") is not None:
        said = config["quantization_config"]
        facts["quantization"] = said.get("quant_method") if isinstance(said, dict) else "unknown"
        notice = _try(facts, lambda: quantised_notice(path))
        facts["notes"] += [notice] if notice else []
        config = without_quantisation(config)
    if config.get("auto_map"):
        facts["own_code"] = True
        facts["notes"].append("it has classes of its own (auto_map), which kdscale runs only if the config allows it")
    family: Family | None = _try(facts, lambda: load_family(config, str(path / "config.json")))
    checkpoint: Checkpoint | None = _try(facts, lambda: Checkpoint.open(path))
    if checkpoint is not None:
        facts["weights"] = _weights(checkpoint)
    dims: Dims | None = None
    if family is not None:
        dims = _try(facts, lambda: family.dims(config))
        facts |= {"family": family.data.name, "nested": _nested(config)}
    if family is not None and dims is not None:
        facts |= _sizes(family, config, dims)
        if checkpoint is not None:
            facts["parts"] = _parts(checkpoint, family, config)
            facts["notes"] += _try(facts, lambda: checkpoint.verify_against(family)) or []
        facts |= what_can_be_cut(family, config, dims, checkpoint)
        facts["tokenizer"] = _tokenizer(path, dims, facts)
    return facts


def _sizes(family: Family, config: dict[str, Any], dims: Dims) -> dict[str, Any]:
    return {
        "sizes": asdict(dims),
        "parameters": asdict(family.count_params(config)),
        "tied": bool(family.tied(config)),
        "context": family.language(config).get("max_position_embeddings"),
    }


def _nested(config: dict[str, Any]) -> dict[str, Any] | None:
    """Of a model of several modalities: its name, and where its language model lies."""
    data = nested_data(config)
    if data is None:
        return None
    return {"model": data.name, "language_model": data.text_config, "hidden_fixed": data.hidden_fixed}


def _weights(checkpoint: Checkpoint) -> dict[str, Any]:
    kinds: Counter[str] = Counter()
    for name in checkpoint.names:
        kinds[checkpoint.spec(name).dtype] += math.prod(checkpoint.spec(name).shape)
    on_disk = sum(file.stat().st_size for file in checkpoint.files)
    return {"files": len(checkpoint.files), "bytes": on_disk, "dtypes": dict(kinds.most_common())}


def _parts(checkpoint: Checkpoint, family: Family, config: dict[str, Any]) -> list[dict[str, Any]]:
    """The language model, heads that a student does without, and what goes along, with their tensors and values."""
    expected = family.tensors(config)
    heads = dropped_heads(family.language(config).get("model_type"), family.dims(config).layers)
    parts: dict[str, Counter[str]] = {}
    for name in checkpoint.names:
        full = family.full_name(name)
        head = next((what for glob, what in heads.items() if fnmatch.fnmatchcase(full, glob)), None)
        if full in expected:
            title = LANGUAGE
        elif head is not None:
            title = head
        else:
            title = ".".join(full.split(".")[: 2 if full.startswith("model.") else 1])
        part = parts.setdefault(title, Counter())
        part["tensors"] += 1
        part["parameters"] += math.prod(checkpoint.spec(name).shape)
    return [{"what": title, **counts} for title, counts in parts.items()]


def _tokenizer(path: Path, dims: Dims, facts: dict[str, Any]) -> bool:
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        facts["problems"].append("there is no tokenizer beside the weights, and a run needs one")
        return False
    fit = _try(facts, lambda: check_tokenizer(path, dims.vocab))
    if fit is not None and fit.notice:
        facts["notes"].append(fit.notice)
    return fit is not None


def _adapter(path: Path) -> dict[str, Any]:
    from kdscale.files import read_json
    from kdscale.models.lora.adapter_files import open_adapter

    config = read_json(path / ADAPTER_CONFIG, CheckpointError, expect=dict)
    facts: dict[str, Any] = {
        "path": str(path), "kind": "adapter", "notes": [], "problems": [],
        "adapter": {"type": config.get("peft_type"), "of": config.get("base_model_name_or_path")},
    }  # fmt: skip
    adapter = _try(facts, lambda: open_adapter(path))
    if adapter is not None:
        facts["adapter"] |= {"rank": adapter.rank, "modules": len(adapter.low_rank), "replaced": len(adapter.replaced)}
        facts["notes"].append("a config names it beside its model: teacher.adapters")
    return facts


def _try(facts: dict[str, Any], ask: Callable[[], Any]) -> Any:
    """The answer; None where it is an error, which is one of the problems then."""
    try:
        return ask()
    except KdscaleError as error:
        facts["problems"].append(" ".join(str(error).split()))
        return None
