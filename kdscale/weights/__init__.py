"""Checkpoint folders: read lazily, written shard by shard, found by path or hub id."""

from kdscale.weights.locate import resolve_teacher
from kdscale.weights.reader import (
    Checkpoint,
    TensorInfo,
    checkpoint_identity,
    config_on_disk,
    quantised_notice,
    read_config,
)
from kdscale.weights.sidecars import check_tokenizer, copy_sidecars, sidecar_names, without_own_classes
from kdscale.weights.writer import ShardWriter

__all__ = [
    "Checkpoint",
    "ShardWriter",
    "TensorInfo",
    "check_tokenizer",
    "checkpoint_identity",
    "config_on_disk",
    "copy_sidecars",
    "quantised_notice",
    "read_config",
    "resolve_teacher",
    "sidecar_names",
    "without_own_classes",
]
