"""Offload and pass-through options of ZeRO change no bit of the student; what cannot run here is refused at once."""

from __future__ import annotations

import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from kdscale.distill import engine
from kdscale.errors import ConfigError

CASES = {
    "optimizer, stage 1": (1, "float32", {"offload_optimizer": "cpu"}),
    "optimizer, stage 2": (2, "bfloat16", {"offload_optimizer": "cpu"}),
    "optimizer, stage 3": (3, "bfloat16", {"offload_optimizer": "cpu"}),
    "weights, stage 3": (3, "bfloat16", {"offload_parameters": "cpu"}),
    "both, stage 3": (3, "bfloat16", {"offload_optimizer": "cpu", "offload_parameters": "cpu"}),
    "small buckets": (2, "bfloat16", {"reduce_bucket": 20_000, "allgather_bucket": 20_000}),
    # tiny weights are below DeepSpeed's own threshold, and stay gathered in all other runs
    "no weights kept gathered": (3, "bfloat16", {"keep_gathered": 0}),
    "pass-through": (3, "bfloat16", {"extra": {"overlap_comm": False, "stage3_max_live_parameters": 50_000}}),
}


@pytest.fixture(scope="module")
def plain_runs():
    return {}


@pytest.mark.parametrize("case", CASES)
def test_options_change_no_bit(distil, plain_runs, tmp_path, case):
    stage, dtype, zero = CASES[case]

    def outcome(name, **more):
        rows = distil(tmp_path / name, zero_stage=stage, dtype=dtype, tokens=3 * 4 * 48, micro_batch=1, **more)
        weights = {k: t.clone() for k, t in load_file(tmp_path / name / "student" / "model.safetensors").items()}
        return [row for row in rows if row["kind"] == "train"], weights

    if (stage, dtype) not in plain_runs:
        plain_runs[stage, dtype] = outcome("plain")
    expected, weights = plain_runs[stage, dtype]
    got, found = outcome("changed", zero=zero)
    assert [row["loss"] for row in got] == [row["loss"] for row in expected]
    # offloaded norms are summed in another order
    assert [row["grad_norm"] for row in got] == pytest.approx([row["grad_norm"] for row in expected], rel=1e-6)
    assert all(found[name].equal(weights[name]) for name in weights)


def test_layers_that_compute_again_may_gather_what_their_forward_found(distil, plain_runs, tmp_path):
    """Weights are fetched ahead and let go at once, so that the second time a layer has operators of its own."""
    gathers = {"stage3_max_reuse_distance": 0, "stage3_max_live_parameters": 60_000,
               "stage3_prefetch_bucket_size": 20_000}  # fmt: skip
    settings = {"zero_stage": 3, "dtype": "bfloat16", "tokens": 2 * 4 * 48, "micro_batch": 1}
    losses = [
        [row["loss"] for row in distil(tmp_path / level, **settings, zero={"extra": gathers, "keep_gathered": 0},
                                       gradient_checkpointing=level) if row["kind"] == "train"]
        for level in ("off", "selective")
    ]  # fmt: skip
    assert losses[0] == losses[1]


def test_an_offloaded_run_resumes_to_the_same_bytes(distil, tmp_path, dies_at_step):
    settings = {"zero_stage": 3, "dtype": "bfloat16", "tokens": 4 * 4 * 48, "checkpoint_every": 2,
                "zero": {"offload_optimizer": "cpu", "offload_parameters": "cpu"}}  # fmt: skip
    distil(tmp_path / "whole", **settings)
    with dies_at_step(3):
        distil(tmp_path / "broken", **settings)
    distil(tmp_path / "broken", **settings)
    whole, broken = ((tmp_path / run / "student" / "model.safetensors").read_bytes() for run in ("whole", "broken"))
    assert whole == broken


class FileHandle:
    """Stands in for DeepSpeed's asynchronous handle, which needs libaio: the same files, written at once."""

    def __init__(self, **settings):
        self._pinned, self._done = set(), 0

    def new_cpu_locked_tensor(self, numel, example):
        made = torch.zeros(numel, dtype=example.dtype)
        self._pinned.add(made.untyped_storage().data_ptr())
        return made

    def free_cpu_locked_tensor(self, tensor):
        self._pinned.discard(tensor.untyped_storage().data_ptr())

    def is_pinned(self, tensor):
        return tensor.untyped_storage().data_ptr() in self._pinned

    def async_pwrite(self, buffer, path, offset):
        buffer.detach().numpy().tofile(path)
        self._done += 1
        return 0

    def async_pread(self, buffer, path, offset):
        buffer.detach().numpy()[:] = np.fromfile(path, np.float32, buffer.numel())
        self._done += 1
        return 0

    def wait(self):
        done, self._done = self._done, 0
        return done


@pytest.fixture
def nvme(tmp_path, monkeypatch):
    """Options that put the optimiser's state on a disk, in sub-groups as small as the tiny student's."""
    from deepspeed.runtime.swap_tensor import partitioned_optimizer_swapper
    from deepspeed.runtime.swap_tensor.optimizer_utils import OptimizerSwapper

    class Builder:
        def load(self):
            return SimpleNamespace(aio_handle=FileHandle)

    def is_swappable(self, tensor=None, numel=None):
        return (numel if tensor is None else tensor.numel()) >= 4096

    monkeypatch.setattr(partitioned_optimizer_swapper, "AsyncIOBuilder", Builder)
    monkeypatch.setattr(OptimizerSwapper, "is_swappable_tensor", is_swappable)
    monkeypatch.setattr(engine, "has_async_io", lambda: True)
    return {"offload_optimizer": "nvme", "nvme_path": str(tmp_path), "extra": {"sub_group_size": 50_000}}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_state_on_nvme_changes_no_bit_and_resumes_to_the_same_bytes(distil, nvme, tmp_path, dies_at_step, dtype):
    settings = {"zero_stage": 3, "dtype": dtype, "tokens": 4 * 4 * 48, "checkpoint_every": 2}
    plain = distil(tmp_path / "plain", **settings, zero={"extra": nvme["extra"]})
    whole = distil(tmp_path / "whole", **settings, zero=nvme)
    files = list(tmp_path.rglob("*.tensor.swp"))
    assert sum("exp_avg" in file.name for file in files) >= 4  # more than one sub-group, both moments
    with dies_at_step(3):
        distil(tmp_path / "broken", **settings, zero=nvme)
    distil(tmp_path / "broken", **settings, zero={"extra": nvme["extra"]})  # written from NVMe, read into memory
    shutil.copytree(tmp_path / "plain", tmp_path / "other", ignore=shutil.ignore_patterns("student", "step-4"))
    distil(tmp_path / "other", **settings, zero=nvme)  # and the other way round
    assert [row["loss"] for row in whole] == [row["loss"] for row in plain]
    names = ("plain", "whole", "broken", "other")
    assert len({(tmp_path / name / "student" / "model.safetensors").read_bytes() for name in names}) == 1


@pytest.mark.parametrize("option", ["quantized_weights", "quantized_gradients"])
def test_what_only_gpus_can_do_is_refused_before_a_weight_is_read(distil, tmp_path, option):
    with pytest.raises(ConfigError, match=f"distill.zero.{option}"):
        distil(tmp_path, student=tmp_path / "no-such-student", zero_stage=3, zero={option: True})


def test_an_nvme_folder_that_is_not_there_is_refused(distil, tmp_path):
    zero = {"offload_optimizer": "nvme", "nvme_path": str(tmp_path / "nowhere")}
    with pytest.raises(ConfigError, match=r"distill\.zero\.nvme_path"):
        distil(tmp_path, student=tmp_path / "no-such-student", zero_stage=3, zero=zero)


def test_nvme_without_its_library_is_refused(distil, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "has_async_io", lambda: False)
    zero = {"offload_optimizer": "nvme", "nvme_path": str(tmp_path)}
    with pytest.raises(ConfigError, match="async_io"):
        distil(tmp_path, student=tmp_path / "no-such-student", zero_stage=3, zero=zero)
