"""Checkpoint folders: read lazily, written shard by shard, found by path or hub id."""

from kdscale.weights.reader import Checkpoint, TensorInfo, read_config

__all__ = ["Checkpoint", "TensorInfo", "read_config"]
