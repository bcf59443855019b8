"""The memory model: shapes exactly, tensors as autograd saves them, rules as the libraries have them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.distill.lora import LoraConfig
from kdscale.config.distill.recompute import RECOMPUTE
from kdscale.families import load_family
from kdscale.sizing import loss_memory, memory
from kdscale.sizing.job import Adapters, Job, Setting
from kdscale.sizing.memory import peak_memory
from kdscale.sizing.model_shape import ModelShape

TEACHERS = Path(__file__).resolve().parents[2] / "fixtures" / "teachers"


def shape(name: str) -> ModelShape:
    config = json.loads((TEACHERS / name / "config.json").read_text())
    return ModelShape.of(config, load_family(config, name))


LLAMA = shape("Llama-3.1-8B")
P = 8_030_261_248
JOB = Job(LLAMA, LLAMA, seq_len=4096, ranks=8, ranks_per_node=8)


def setting(stage: int = 1, **more: Any) -> Setting:
    return Setting(**{"stage": stage, "micro_batch": 1, "accumulation": 1, "recompute": RECOMPUTE["full"],
                      "placement": "replicated", **more})  # fmt: skip


def test_llama_8b_has_its_published_counts() -> None:
    assert LLAMA.params == P
    assert LLAMA.layer == 218_112_000
    assert LLAMA.products == P - 128_256 * 4096 - 65 * 4096  # the embedding is looked up, norms are no products
    assert (LLAMA.gated, LLAMA.tied, LLAMA.qk_norm) == (True, False, False)


def test_a_tied_head_is_multiplied_once_and_qwen3_norms_its_heads() -> None:
    smollm, qwen = shape("smollm2-135m-instruct"), shape("Qwen3-8B")
    assert smollm.tied
    assert smollm.products == smollm.params - 61 * 576 == 134_515_008 - 61 * 576  # two norms a layer, and the last
    assert qwen.qk_norm


@pytest.mark.parametrize(
    ("stage", "weights", "states"), [(1, 2 * P, 12 * P / 8), (2, 2 * P, 12 * P / 8), (3, 2 * P / 8, 12 * P / 8)]
)
def test_zero_divides_what_its_stage_says(stage: int, weights: float, states: float) -> None:
    parts = peak_memory(JOB, setting(stage)).parts
    assert parts["student weights"] == weights
    assert parts["masters and Adam"] == states
    assert parts["teacher"] == 2 * P


@pytest.mark.parametrize(
    ("dtype", "teacher"), [("float32", 4 * P), *((name, 2 * P - 32 * 218_103_808) for name in ("float8", "int8"))]
)
def test_a_teacher_may_have_a_dtype_of_its_own(dtype: Any, teacher: float) -> None:
    """8 bits halve what its layers multiply with: all but embedding, head and norms."""
    own = replace(JOB, teacher_dtype=dtype)
    assert peak_memory(own, setting()).parts["teacher"] == teacher
    assert peak_memory(own, setting()).parts["student weights"] == 2 * P
    assert peak_memory(own, setting(placement="offloaded")).host >= own.teacher_bytes * P / 8


def test_a_teacher_that_looks_ahead_needs_its_forward_beside_the_backward() -> None:
    alone, ahead = (peak_memory(JOB, setting(3, overlap=overlap)) for overlap in (False, True))
    assert alone.moment == "student's backward"
    assert ahead.parts["teacher ahead"] == memory.forward_bytes(JOB, LLAMA, setting()) + loss_memory.teacher_loss_bytes(
        JOB, setting()
    )
    assert ahead.total == pytest.approx(alone.total + ahead.parts["teacher ahead"] * (1 + memory.MARGIN))


def test_fp32_copies_its_weights_at_stage_1_and_2_only() -> None:
    job = replace(JOB, item_bytes=4)
    states = {stage: peak_memory(job, setting(stage)).parts["masters and Adam"] for stage in (0, 1, 2, 3)}
    assert states == {0: 8 * P, 1: 12 * P / 8, 2: 12 * P / 8, 3: 8 * P / 8}


def test_offload_moves_states_to_the_host_and_the_teacher_is_there_once_a_node() -> None:
    found = peak_memory(JOB, setting(3, offload_optimizer=True, offload_parameters=True, placement="offloaded"))
    assert "masters and Adam" not in found.parts
    assert "student weights" not in found.parts
    assert "teacher" not in found.parts
    assert found.host == (16 + 2 + 4) * P / 8 + 2 * P / 8  # the weights, and the sums of gradients


def test_a_partitioned_teacher_is_flat_in_its_depth_but_for_its_share() -> None:
    deep = replace(JOB, teacher=replace(LLAMA, params=4 * P, layers=128))
    totals = [peak_memory(job, setting(3, placement="partitioned")).total for job in (JOB, deep)]
    assert totals[1] - totals[0] == pytest.approx(1.1 * 2 * 3 * P / 8)


def test_hpz_keeps_a_second_copy_in_each_group() -> None:
    job = replace(JOB, ranks=32)
    assert peak_memory(job, setting(3, hpz=8)).parts["student weights"] == 2 * P / 32 + 2 * P / 8


def test_gradients_that_wait_are_whole_at_stage_1() -> None:
    job = replace(JOB, gradient_bytes=2)
    once, often = (peak_memory(job, setting(1, accumulation=a)).parts.get("gradients", 0) for a in (1, 4))
    assert often - once > P


@pytest.mark.parametrize("accumulation", [1, 4])
@pytest.mark.parametrize(
    ("stage", "offloaded", "on_the_gpu", "on_the_host"),
    [
        (1, False, 4 * P, 0),
        (1, True, 4 * P + 4 * P / 8, (16 + 2) * P / 8),
        (2, False, (4 + 2) * P / 8, 0),
        (2, True, (4 + 2) * P / 8, (16 + 2) * P / 8),
        (3, False, 4 * P / 8, 0),
        (3, True, 0, (16 + 4) * P / 8),
    ],
)
def test_sums_of_gradients_in_fp32(
    stage: int, offloaded: bool, on_the_gpu: float, on_the_host: float, accumulation: int
) -> None:
    chosen = setting(stage, offload_optimizer=offloaded, accumulation=accumulation)
    assert memory._gradients(JOB, chosen) == on_the_gpu
    assert memory.host_bytes(JOB, chosen) == on_the_host


def test_fp32_training_adds_gradients_up_as_it_makes_them() -> None:
    for stage in (0, 1, 2, 3):
        job = replace(JOB, item_bytes=4)
        assert memory._gradients(job, setting(stage)) == (4 * P if stage == 0 else 4 * P / 8)


@pytest.mark.parametrize("item_bytes", [2, 4])
@pytest.mark.parametrize("vocab", [1_000, 8_192, 49_152])
@pytest.mark.parametrize("rows", [50, 512, 4_096])
def test_the_loss_runs_in_the_mode_that_the_kernels_choose(rows: int, vocab: int, item_bytes: int) -> None:
    from kdscale_kernels.fused.memory_plan import CallSize, plan_memory

    model = replace(LLAMA, hidden=576, vocab=vocab)
    narrow = item_bytes == 2
    plan = plan_memory(CallSize(rows, 576, vocab, "cpu", 1, 4, narrow, narrow, narrow, 2), "auto", None, None)
    chunk, by_rows = loss_memory.loss_chunk(Job(model, model, rows, 1, 1, item_bytes=item_bytes, device="cpu"), rows)
    assert by_rows == (plan.mode == "row_chunks")
    if by_rows:
        assert chunk == plan.chunk_bytes


def test_constants_are_those_of_the_libraries() -> None:
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    from kdscale.distill.parallel.deepspeed_config import BUCKET
    from kdscale_kernels.fused import memory_plan, products

    assert loss_memory.CHUNK_BYTES == products.CHUNK_BYTES
    assert memory_plan.CPU_WORKSPACE == loss_memory.CPU_WORKSPACE
    assert memory_plan.FEWEST_ROWS["cpu"] == loss_memory.FEWEST_ROWS
    zero = DeepSpeedZeroConfig(stage=3)
    assert (zero.max_live_parameters, zero.prefetch_bucket_size) == (memory.MAX_LIVE, memory.PREFETCH)
    assert zero.sub_group_size == memory.SUB_GROUP
    assert BUCKET["cuda"] == JOB.reduce_bucket


def test_adapters_alone_have_gradients_and_states() -> None:
    """Rank 16 on q and v: 16·(4096 + 4096) + 16·(4096 + 1024) a layer. The base teaches without weights of its own."""
    config = json.loads((TEACHERS / "Llama-3.1-8B" / "config.json").read_text())
    adapters = Adapters.of(LoraConfig(rank=16, targets=("q_proj", "v_proj")), config)
    assert adapters == Adapters(32 * 16 * (8192 + 5120), 32 * 2 * 16)
    job = replace(JOB, adapters=adapters, base=True)
    parts = peak_memory(job, setting(1)).parts
    assert parts["student weights"] == 2 * (P + adapters.params)
    assert parts["masters and Adam"] == 12 * adapters.params / 8
    assert parts["gradients"] <= 4 * adapters.params and "teacher" not in parts
    no_recompute = setting(1, recompute=RECOMPUTE["off"])
    more = memory.saved_bytes(job, no_recompute) - memory.saved_bytes(JOB, no_recompute)
    assert more == 4096 * 2 * 32 * 2 * 16  # what each A gives
    assert loss_memory.loss_bytes(JOB, setting(1)) - loss_memory.loss_bytes(job, setting(1)) == 4 * LLAMA.head
    assert peak_memory(replace(JOB, reference=True), setting(1)).parts["reference"] == 2 * P
    host = peak_memory(job, setting(3, offload_optimizer=True, offload_parameters=True)).host
    assert host == (16 + 4) * adapters.params / 8 + 2 * (P + adapters.params) / 8
