"""Throughput, spikes, timed collectives and the profiler, each by itself."""

from __future__ import annotations

import json
import math
from types import SimpleNamespace

import pytest
import torch

from kdscale.config.telemetry import ProfileConfig, SpikeConfig
from kdscale.distill.replay import find_start, parameter_group
from kdscale.distill.telemetry import collectives
from kdscale.distill.telemetry.collectives import CollectiveTimer
from kdscale.distill.telemetry.profiling import StepProfiler
from kdscale.distill.telemetry.spikes import SpikeDetector, name_documents
from kdscale.distill.telemetry.throughput import SpeedReport, peak_flops
from kdscale.sizing.flops import ModelFlops, step_flops
from kdscale.sizing.gpus import find_gpu, known_gpus, peak_by_name

LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 320,
    "tie_word_embeddings": True, "hidden_act": "silu", "rms_norm_eps": 1e-5, "max_position_embeddings": 128,
}  # fmt: skip
CPU = torch.device("cpu")


def test_flops_are_those_of_the_products():
    """Counted one product at a time: q, k, v, o, gate, up, down; QKᵀ and AV over the sequence; the tied head."""
    products = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 96
    flops = ModelFlops.of(LLAMA, seq_len=10)
    assert flops.per_token == 3 * (2 * products + 2 * 2 * 64 * 10)
    assert flops.per_label == 2 * 64 * 320
    other = ModelFlops(per_token=7.0, per_label=5.0)
    assert step_flops(other, flops, 100, 90) == 100 * (7 + 3 * flops.per_token) + 90 * (5 + 3 * flops.per_label)
    assert step_flops(None, flops, 100, 90) == 3 * (100 * flops.per_token + 90 * flops.per_label)


def test_a_mixture_counts_the_experts_a_token_is_routed_to():
    sizes = {**LLAMA, "model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 8,
             "num_experts_per_tok": 2, "tie_word_embeddings": False}  # fmt: skip
    products = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 2 * 3 * 64 * 96 + 8 * 64  # the router sees every expert
    assert ModelFlops.of(sizes, seq_len=10).per_token == 3 * (2 * products + 2 * 2 * 64 * 10)


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


def test_a_cpu_has_no_peak_of_its_own():
    assert peak_flops(None, CPU, torch.bfloat16) is None
    assert peak_flops(5e12, CPU, torch.float32) == 5e12


def test_the_speed_line_is_about_the_steps_since_the_last_one():
    report = SpeedReport()
    assert report.line("communication", 0.0) == ""
    report.add(1000, 2.0, {"teacher": 1.0, "backward": 0.5, "communication": 0.2}, 0.25)
    report.add(1000, 2.0, {"teacher": 1.0, "backward": 0.5, "communication": 0.2}, 0.75)
    line = report.line("communication", 3e9)
    assert line == (
        "500 tok/s · MFU 50.0 % · teacher 50 %, backward 25 % · communication 10 % (within these) · "
        "peak memory a rank 3.00 GB"
    )
    assert report.line("communication", 0.0) == ""


# --- spikes


def losses(steps: int) -> list[float]:
    """A falling curve with seeded noise."""
    noise = torch.randn(steps, generator=torch.Generator().manual_seed(0)) * 0.05
    return [3.0 * math.exp(-i / 200) + 1.0 + float(noise[i]) for i in range(steps)]


def test_noise_and_progress_are_no_spikes():
    detector = SpikeDetector(SpikeConfig())
    assert not any(detector.look(loss) for loss in losses(400))


def test_a_spike_is_seen_and_does_not_hide_the_next():
    detector = SpikeDetector(SpikeConfig())
    found = [detector.look(loss + (2.0 if i in (100, 101, 150) else 0.0)) for i, loss in enumerate(losses(200))]
    assert [i for i, spike in enumerate(found) if spike] == [100, 101, 150]
    assert found[100].limit < found[100].loss


def test_a_resumed_detector_sees_what_an_unbroken_one_does():
    curve = losses(120)
    curve[110] += 2.0
    whole, cut = SpikeDetector(SpikeConfig()), SpikeDetector(SpikeConfig(), curve[:90])
    unbroken = [whole.look(loss) for loss in curve]
    assert [cut.look(loss) for loss in curve[90:]] == unbroken[90:]
    assert unbroken[110] is not None


def test_the_first_losses_infinite_ones_and_a_switched_off_detector_say_nothing():
    detector = SpikeDetector(SpikeConfig(after=4), [1.0, 1.0])
    assert [detector.look(loss) for loss in (1.0, math.nan, math.inf)] == [None] * 3
    assert detector.look(90.0) is None  # only three are known before it
    assert SpikeDetector(SpikeConfig(after=4), [1.0] * 4).look(90.0)
    off = SpikeDetector(SpikeConfig(enabled=False), [1.0] * 64)
    assert off.look(90.0) is None


def test_documents_of_the_worst_micro_batch_come_first():
    def row(loss, documents):
        return {"loss": loss, "sequences": [{"documents": documents, "sources": ["web"] * len(documents)}]}

    assert name_documents([row(1.0, [4, 5]), row(9.0, [7, 4])]) == "7 (web), 4 (web), 5 (web)"
    assert name_documents([row(9.0, [4]), row(None, [8])]).startswith("8 (web)")
    assert name_documents([row(1.0, list(range(30)))]).endswith("11 (web) and 18 more")


# --- collectives


def test_nested_collectives_count_once_and_a_wait_counts(monkeypatch):
    clock = iter([0.0, 1.0, 10.0, 13.0])
    monkeypatch.setattr(collectives, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    timer = CollectiveTimer(CPU)
    handle = SimpleNamespace(wait=lambda: "over", done=True)
    inner = timer.timed(lambda: handle)
    under_way = timer.timed(inner)()
    assert under_way.done
    assert under_way.wait() == "over"
    assert timer.seconds() == 1.0 + 3.0
    assert timer.seconds() == 0.0


def test_functions_are_put_back():
    before = torch.distributed.all_reduce
    with CollectiveTimer(CPU).installed():
        assert torch.distributed.all_reduce is not before
    assert torch.distributed.all_reduce is before


# --- profiler and replay


def test_only_the_asked_steps_of_the_asked_ranks_are_profiled(tmp_path):
    settings = ProfileConfig(steps=(3, 4))
    profilers = [StepProfiler(settings, tmp_path, rank, CPU) for rank in range(2)]
    written = []
    for step in range(1, 6):
        for profiler in profilers:
            profiler.begin(step)
        torch.ones(8, 8) @ torch.ones(8, 8)
        for profiler in profilers:
            written += profiler.end(step)
    assert [path.name for path in written] == [
        "steps-3-4-rank-0.trace.json", "steps-3-4-rank-0.operators.txt",
    ]  # fmt: skip
    events = json.loads(written[0].read_text())["traceEvents"]
    assert sum(event.get("name") == "aten::mm" for event in events) == 2


def test_a_profile_that_is_cut_short_is_kept(tmp_path):
    profiler = StepProfiler(ProfileConfig(steps=(3, 9), ranks="all"), tmp_path, 1, CPU)
    profiler.begin(3)
    assert profiler.end(3) == []
    assert profiler.close(3)[0].name == "steps-3-3-rank-1.trace.json"


def test_parameter_groups():
    names = {
        "model.embed_tokens.weight": "embed_tokens",
        "model.layers.3.self_attn.q_proj.weight": "layer 3 attention",
        "model.layers.3.mlp.up_proj.weight": "layer 3 ffn",
        "model.layers.3.post_attention_layernorm.weight": "layer 3 norm",
        "transformer.h.0.ln_1.bias": "layer 0 norm",
        "lm_head.weight": "lm_head",
    }
    assert {name: parameter_group(name) for name in names} == names


def test_a_replay_starts_at_the_newest_whole_checkpoint_before_its_step(tmp_path):
    for number in (3, 6, 9):
        folder = tmp_path / f"step-{number:08d}"
        folder.mkdir()
        if number != 6:  # torn
            (folder / "manifest.json").write_text("{}")
    assert [find_start(tmp_path, step).step for step in (1, 3, 4, 9, 10)] == [0, 0, 3, 3, 9]
