"""Peaks of GPUs by name."""

from __future__ import annotations

import pytest

from kdscale.sizing.gpus import find_gpu, known_gpus, peak_by_name


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H200", 989e12),
        ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A10G", 70e12), ("NVIDIA A10", 125e12), ("NVIDIA L4", 121e12),
        ("Tesla T4", None), ("NVIDIA H1000", None),
    ],
)  # fmt: skip
def test_peaks_by_name(name, peak):
    assert peak_by_name(name) == peak


def test_the_log_and_plan_cluster_have_one_peak_for_a_gpu():
    gpus = [find_gpu(name) for name in known_gpus()]
    assert {gpu.name: peak_by_name(gpu.name) for gpu in gpus} == {gpu.name: gpu.flops for gpu in gpus}
    assert find_gpu("h200").flops == 989e12
