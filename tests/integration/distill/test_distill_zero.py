"""Offload and pass-through options of ZeRO change no bit of the student; what cannot run here is refused at once."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from kdscale.distill import loop
from kdscale.errors import ConfigError

CASES = {
    "optimizer, stage 1": (1, "float32", {"offload_optimizer": "cpu"}),
    "optimizer, stage 2": (2, "bfloat16", {"offload_optimizer": "cpu"}),
    "optimizer, stage 3": (3, "bfloat16", {"offload_optimizer": "cpu"}),
    "weights, stage 3": (3, "bfloat16", {"offload_parameters": "cpu"}),
    "both, stage 3": (3, "bfloat16", {"offload_optimizer": "cpu", "offload_parameters": "cpu"}),
    "small buckets": (2, "bfloat16", {"reduce_bucket": 20_000, "allgather_bucket": 20_000}),
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


def test_an_offloaded_run_resumes_to_the_same_bytes(distil, tmp_path, monkeypatch):
    settings = {"zero_stage": 3, "dtype": "bfloat16", "tokens": 4 * 4 * 48, "checkpoint_every": 2,
                "zero": {"offload_optimizer": "cpu", "offload_parameters": "cpu"}}  # fmt: skip
    distil(tmp_path / "whole", **settings)
    real = loop.Trainer._one_step

    def die_at_3(self, number, *args):
        if number == 3:
            raise ZeroDivisionError
        return real(self, number, *args)

    monkeypatch.setattr(loop.Trainer, "_one_step", die_at_3)
    with pytest.raises(ZeroDivisionError):
        distil(tmp_path / "broken", **settings)
    monkeypatch.setattr(loop.Trainer, "_one_step", real)
    distil(tmp_path / "broken", **settings)
    whole, broken = ((tmp_path / run / "student" / "model.safetensors").read_bytes() for run in ("whole", "broken"))
    assert whole == broken


@pytest.mark.parametrize("option", ["quantized_weights", "quantized_gradients"])
def test_what_only_gpus_can_do_is_refused_before_a_weight_is_read(distil, tmp_path, option):
    with pytest.raises(ConfigError, match=f"distill.zero.{option}"):
        distil(tmp_path, student=tmp_path / "no-such-student", zero_stage=3, zero={option: True})


def test_an_nvme_folder_that_is_not_there_is_refused(distil, tmp_path):
    zero = {"offload_optimizer": "nvme", "nvme_path": str(tmp_path / "nowhere")}
    with pytest.raises(ConfigError, match=r"distill\.zero\.nvme_path"):
        distil(tmp_path, student=tmp_path / "no-such-student", zero_stage=3, zero=zero)


def test_nvme_without_its_library_is_refused(distil, tmp_path, monkeypatch):
    from kdscale.distill import engine

    monkeypatch.setattr(engine, "_has_async_io", lambda: False)
    zero = {"offload_optimizer": "nvme", "nvme_path": str(tmp_path)}
    with pytest.raises(ConfigError, match="async_io"):
        distil(tmp_path, student=tmp_path / "no-such-student", zero_stage=3, zero=zero)
