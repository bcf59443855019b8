"""What a GGUF file is, by its metadata and the types of its tensors; no value of a tensor is read."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kdscale.errors import KdscaleError
from kdscale.jobs.inspection.cuts import what_can_be_cut
from kdscale.packaging.gguf_teacher.config import read_config
from kdscale.packaging.gguf_teacher.file import GgufFile


def inspect_gguf(path: Path) -> dict[str, Any]:
    """As `inspect_path`. Raises ConfigError without the package gguf, CheckpointError for no GGUF file."""
    file = GgufFile(path)
    kinds: Counter[str] = Counter()
    for name in file.names:
        kinds[file.kind(name)] += math.prod(file.shape(name))
    largest = kinds.most_common()
    facts: dict[str, Any] = {
        "path": str(path), "kind": "gguf", "architecture": file.architecture, "name": file.get("general.name"),
        "weights": {"files": 1, "bytes": path.stat().st_size, "dtypes": dict(largest)},
        "quantization": largest[0][0] if largest else None, "notes": [], "problems": [],
    }  # fmt: skip
    try:
        family, config = read_config(file)
        dims = family.dims(config)
        facts |= {
            "family": family.name, "model_type": config["model_type"], "sizes": asdict(dims),
            "parameters": asdict(family.count_params(config)), "tied": bool(family.tied(config)),
            "context": config.get("max_position_embeddings"), **what_can_be_cut(family, config, dims),
        }  # fmt: skip
        facts["notes"].append("kdscale get-teacher FILE FOLDER makes a teacher of it")
    except KdscaleError as error:
        facts["problems"].append(" ".join(str(error).split()))
    return facts
