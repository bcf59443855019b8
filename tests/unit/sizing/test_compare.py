"""Speed, the choice between settings, and that every shipped config can be planned and takes the lines it is given."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from kdscale.config.distill.recompute import RECOMPUTE
from kdscale.config.load import build_config, config_folder, find_config, load_config
from kdscale.errors import ConfigError
from kdscale.families import load_family
from kdscale.jobs.cluster_plan import plan_cluster, snippet, to_json
from kdscale.sizing.compare import compare
from kdscale.sizing.flops import ModelFlops, mfu, step_flops
from kdscale.sizing.gpus import GIB, GpuCluster, find_gpu, known_gpus, peak_by_name
from kdscale.sizing.job import Job, Setting
from kdscale.sizing.memory import peak_memory, recomputed_bytes
from kdscale.sizing.model_shape import ModelShape
from kdscale.sizing.parallel import sequence_parallel_seconds, tensor_parallel_seconds
from kdscale.sizing.speed import Rates, estimate_step

TEACHERS = Path(__file__).resolve().parents[2] / "fixtures" / "teachers"
NAMES = sorted(path.name.removesuffix(".yaml") for path in config_folder().glob("*.yaml"))
PLANNED_FOR = ("a100-40", "h100", "b200")  # each config for one of them in turn; the other pairs are `long`
H100 = find_gpu("h100")
OFF, FULL = RECOMPUTE["off"], RECOMPUTE["full"]


def llama() -> ModelShape:
    config = json.loads((TEACHERS / "Llama-3.1-8B" / "config.json").read_text())
    return ModelShape.of(config, load_family(config, "llama"))


def cluster(nodes: int = 1, gpus: int = 8, gpu: str = "h100", host: float = 1024) -> GpuCluster:
    return GpuCluster(find_gpu(gpu), nodes, gpus, host * GIB)


def job(ranks: int = 8, **more: Any) -> Job:
    return Job(**{"student": llama(), "teacher": llama(), "seq_len": 4096, "ranks": ranks, "ranks_per_node": 8, **more})


def forward(*row: int) -> float:
    return ModelFlops.of_shape(llama()).of_a_token(row)


def test_flops_are_two_a_weight_of_the_products_and_attention() -> None:
    products = 8_030_261_248 - 128_256 * 4096 - 65 * 4096  # no looked-up rows, no norms
    assert forward(4096) == 2 * products + 4 * 4096 * 4097 / 2 * 32
    assert forward(1024, 3072) == 2 * products + 4 * (1024 * 1025 / 2 + 3072 * 3073 / 2) * 32


@pytest.mark.parametrize("documents", [None, 1500])
@pytest.mark.parametrize("placement", ["replicated", "served", "cached"])
@pytest.mark.parametrize("tensor", [1, 4])
def test_the_planned_mfu_is_what_the_log_would_say_of_such_a_step(
    placement: Any, tensor: int, documents: int | None
) -> None:
    """The log counts from config.json and from the GPU's driver name."""
    from kdscale.distill.telemetry.observer import StepWork

    setting = Setting(1, 2, 3, OFF, placement, tensor=tensor)
    planned = estimate_step(job(document_tokens=documents), setting, cluster(), Rates())
    row = [4096] if documents is None else [1500, 1500, 1096]
    config = json.loads((TEACHERS / "Llama-3.1-8B" / "config.json").read_text())
    flops, peak = ModelFlops.of(config), peak_by_name("NVIDIA H100 80GB HBM3")
    assert peak is not None
    tokens = 8 // tensor * 2 * 3 * 4096
    logged = StepWork(tokens, flops if placement == "replicated" else None, flops, 8 * peak)
    assert planned.mfu == logged.mfu(tokens, planned.step, lambda: row * (tokens // 4096))
    assert mfu(step_flops(None, flops, 10, 10, [7, 3]), 2.0, 1.0) == pytest.approx(15 * forward(7, 3))


def test_a_collective_takes_as_long_as_its_slower_links() -> None:
    assert cluster().collective(8e9) == pytest.approx(8e9 * 7 / 8 / 450e9)
    assert cluster(4).collective(8e9) == pytest.approx(max(8e9 * 31 / 32 / 450e9, 8e9 * 3 / 4 / (8 * 50e9)))
    assert cluster(4, 1).collective(8e9) == pytest.approx(8e9 * 3 / 4 / 50e9)


def test_compute_is_what_the_flops_say_and_recompute_adds_what_is_done_again() -> None:
    rates = Rates(compute=0.5)
    seconds = {}
    for level in RECOMPUTE.values():
        speed = estimate_step(job(), Setting(1, 1, 4, level, "replicated"), cluster(), rates)
        seconds[level.name] = speed.seconds["student"]
        assert speed.tokens_per_second == pytest.approx(8 * 4 * 4096 / speed.step)
        assert 0 < speed.mfu < 0.5
    slow = 4096 / (4096 + 256)
    assert seconds["off"] == pytest.approx(4 * 4096 * 3 * forward(4096) / (989e12 * 0.5 * slow))
    passes = 4 * 4096 * 32 * 3 / H100.hbm  # of what is made again by element-wise operations
    again = {level.name: passes * recomputed_bytes(job(), llama(), level) for level in RECOMPUTE.values()}
    layers = forward(4096) - 2 * 128_256 * 4096 - 2 * 32 * 4096 * 14336  # without the head and each last product
    assert seconds["full"] - seconds["off"] - again["full"] == pytest.approx(4 * 4096 * layers / (989e12 * 0.5 * slow))
    assert seconds["selective"] - seconds["off"] == pytest.approx(again["selective"])
    assert seconds["off"] < seconds["selective"] < seconds["keep_attention"] < seconds["full"]


def test_a_teacher_in_float8_takes_half_the_time_of_its_layers_products(tmp_path: Path) -> None:
    setting = Setting(1, 1, 4, OFF, "replicated")
    plain, float8 = (
        estimate_step(job(teacher_dtype=dtype), setting, cluster(), Rates()).seconds for dtype in ("auto", "float8")
    )
    halved = llama().linears * 2 / forward(4096)
    assert float8["teacher"] == pytest.approx(plain["teacher"] * (1 - halved / 2))
    assert float8["student"] == plain["student"]
    config = load_config(find_config(NAMES[0]), [f"run_dir={tmp_path}", "distill.teacher_dtype=float8"])
    teacher = TEACHERS / Path(config.teacher.path).name
    assert {found.setting.placement for found in plan_cluster(config, teacher, cluster(), Rates()).settings} == {
        "replicated"
    }
    with pytest.raises(ConfigError, match=r"(?s)teacher_dtype.*8.9 or newer.*A100.*bfloat16"):
        plan_cluster(config, teacher, cluster(gpu="a100-80"), Rates())


def test_a_teacher_that_looks_ahead_fills_the_time_that_the_student_waits() -> None:
    slow = replace(cluster(4), gpu=replace(H100, network=1e9))
    alone, ahead = (
        estimate_step(job(32), Setting(3, 1, 8, OFF, "replicated", overlap=overlap), slow, Rates()).seconds
        for overlap in (False, True)
    )
    assert ahead["teacher"] == pytest.approx(alone["teacher"] / 8)  # nothing looks ahead of a step's first micro-batch
    assert ahead["student"] == alone["student"]
    fast = [
        estimate_step(job(), Setting(3, 1, 8, OFF, "replicated", overlap=overlap), cluster(), Rates()).step
        for overlap in (False, True)
    ]
    assert fast[0] == fast[1]
    small = replace(slow, gpu=replace(slow.gpu, memory=60 * GIB))  # where one micro-batch a step does not fit
    assert compare(job(32), small, 2048, Rates(), stages=(3,), placements=("replicated",))[0].setting.overlap


def test_stage_2_reduces_in_every_micro_batch_and_hpz_spares_the_network() -> None:
    # in gathers of the weights: bf16 gradients take one, fp32 ones two, and stage 1 sums those by an all-reduce
    for size, first, second in ((2, 1 + 1, 1 + 8), (4, 1 + 4, 1 + 16)):
        sums = replace(job(), gradient_bytes=size)
        one = {s: estimate_step(sums, Setting(s, 1, 8, FULL, "replicated"), cluster(), Rates()) for s in (1, 2)}
        assert one[2].seconds["communication"] == pytest.approx(one[1].seconds["communication"] * second / first)
    slow = replace(cluster(4), gpu=replace(H100, network=1e9))
    far, near = (
        estimate_step(job(32), Setting(3, 1, 1, OFF, "replicated", hpz=h), slow, Rates()).seconds["student"]
        for h in (1, 8)
    )
    assert near < far * 0.8  # one of four gathers: the sums of gradients count for two


def test_weights_that_stay_gathered_take_memory_and_no_link_until_the_next_step() -> None:
    slow = replace(cluster(4), gpu=replace(H100, network=1e9))
    shared = job(32)
    weights = shared.item_bytes * shared.student.params
    gathered, kept = (Setting(3, 1, 8, OFF, "replicated", kept=size) for size in (0, shared.student.params))
    fast, slower = (estimate_step(shared, setting, slow, Rates()) for setting in (kept, gathered))
    gather = slow.collective(weights) / Rates().links
    assert slower.step - fast.step == pytest.approx(8 * 2 * gather - gather)
    parts = peak_memory(shared, kept).parts
    assert parts["weights kept gathered"] == weights
    assert "gathered weights" in peak_memory(shared, gathered).parts
    busy = replace(cluster(4), gpu=replace(H100, network=3e9))
    chosen = compare(replace(shared, seq_len=8192), busy, 32 * 16, Rates(), placements=("partitioned",))[0]
    assert chosen.fits
    assert chosen.setting.kept == shared.student.params // 2  # all of them do not fit


def test_what_fits_is_chosen_and_what_does_not_says_by_how_much() -> None:
    found = compare(job(student=replace(llama())), cluster(), 256, Rates())
    assert found[0].fits
    assert found[0].memory.total <= H100.memory
    assert [one.reason for one in found].count("") == 1
    missing = [one for one in found if not one.fits]
    assert missing
    assert all("GiB of" in one.reason for one in missing)
    own = [one.speed.tokens_per_second for one in found if one.fits and one.setting.placement != "served"]
    assert own[0] >= 0.98 * max(own)


def test_a_teacher_whose_targets_are_stored_takes_neither_memory_nor_flops() -> None:
    found = compare(job(), cluster(), 256, Rates(), placements=("replicated", "served", "cached"))
    assert found[0].setting.placement == "cached"
    assert found[0].speed.teacher_flops == found[0].speed.seconds["teacher"] == 0.0
    alone = Setting(1, 1, 1, OFF, "cached")
    parts, held = (peak_memory(job(), replace(alone, placement=one)).parts for one in ("cached", "replicated"))
    assert "teacher" not in parts and held["teacher"] > 2 * 8e9


@pytest.mark.parametrize("placement", ["replicated", "partitioned", "offloaded"])
def test_several_teachers_are_kept_and_run_and_one_of_them_is_asked_at_a_time(placement: Any) -> None:
    small = replace(llama(), params=llama().params // 4, products=llama().products // 4)
    setting = Setting(2, 1, 1, OFF, placement)
    one, two = job(), job(others=(small,))
    weights = [peak_memory(each, setting).parts.get("teacher", 0.0) for each in (one, two)]
    kept = {"replicated": 2.0, "partitioned": 2.0 / 8, "offloaded": 0.0}[placement]
    assert weights[1] - weights[0] == pytest.approx(kept * small.params)
    hosts = [peak_memory(each, setting).host for each in (one, two)]
    assert hosts[1] - hosts[0] == pytest.approx(2 * small.params / 8 if placement == "offloaded" else 0.0)
    seconds = [estimate_step(each, setting, cluster(), Rates()).seconds["teacher"] for each in (one, two)]
    assert 1.1 * seconds[0] < seconds[1] < 1.5 * seconds[0]


def test_an_average_of_the_student_is_planned_as_a_whole_model_below_stage_3(tmp_path: Path) -> None:
    config = load_config(find_config("smollm2-135m-to-82m-average"), [f"run_dir={tmp_path}"])
    plan = plan_cluster(config, TEACHERS / "smollm2-135m-instruct", cluster(2), Rates())
    assert plan.chosen is not None and plan.chosen.setting.stage < 3
    assert {one.setting.placement for one in plan.settings} == {"replicated"}
    assert plan.job.teachers[1] == plan.job.student
    parts = peak_memory(plan.job, plan.chosen.setting).parts
    assert parts["student's average"] == 4.0 * plan.job.student.params
    assert "# in each of teachers: teacher_placement: replicated" in snippet(plan)


def test_a_teacher_that_is_too_large_for_a_gpu_is_partitioned() -> None:
    big = replace(llama(), params=70_000_000_000, products=69_000_000_000, layers=80, layer=860_000_000)
    found = compare(job(32, teacher=big), cluster(4), 256, Rates())
    assert found[0].fits
    assert found[0].setting.placement in ("partitioned", "offloaded")
    assert not any(one.fits for one in found if one.setting.placement == "replicated")


def test_host_memory_limits_what_can_be_offloaded() -> None:
    settings = {"stages": (3,), "placements": ("replicated",)}
    small = compare(job(), cluster(host=64), 256, Rates(), **settings)
    assert not any(one.fits for one in small if one.setting.offload_optimizer)
    assert any("host's 64" in one.reason for one in small)


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        pytest.param(name, gpu, marks=[] if nth % len(PLANNED_FOR) == turn else pytest.mark.long)
        for nth, name in enumerate(NAMES)
        for turn, gpu in enumerate(PLANNED_FOR)
    ],
)
def test_every_shipped_config_takes_the_lines_that_are_planned_for_it(
    name: str, gpu: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(TEACHERS.parent)  # where a config's further teachers are looked for
    config = load_config(find_config(name), [f"run_dir={tmp_path}"])
    plan = plan_cluster(config, TEACHERS / Path(config.teacher.path).name, cluster(2, gpu=gpu), Rates())
    assert plan.chosen is not None
    changes = YAML(typ="safe").load(snippet(plan))["distill"]
    tree = config.resolved()
    tree["distill"] |= changes
    distill = build_config(tree, "planned").distill
    one = plan.chosen.setting
    assert distill.processes == 16
    assert distill.micro_batch * one.accumulation * 16 == distill.global_batch
    assert json.loads(json.dumps(to_json(plan)))["settings"][0]["chosen"]


def test_nothing_fits_is_an_error_with_the_least_that_would_be_needed(tmp_path: Path) -> None:
    config = load_config(find_config("llama3.1-8b-to-4.5b-width"), [f"run_dir={tmp_path}"])
    tiny = replace(cluster(host=8), gpu=replace(H100, memory=8 * GIB))
    plan = plan_cluster(config, TEACHERS / "Llama-3.1-8B", tiny, Rates(), placements=("replicated",))
    assert plan.chosen is None
    with pytest.raises(ConfigError, match="no setting fits"):
        snippet(plan)


def test_the_student_is_the_one_that_was_planned(tmp_path: Path) -> None:
    from kdscale.prune.search.planning import make_plan

    config = load_config(find_config("demo"), [f"run_dir={tmp_path}"])
    teacher = json.loads((TEACHERS / "smollm2-135m-instruct" / "config.json").read_text())
    other = config.prune.model_copy(update={"ffn": 512, "target_params": None})
    made = make_plan(teacher, load_family(teacher, "t"), None, other)
    made.save(tmp_path / "plan.json")
    plan = plan_cluster(config, TEACHERS / "smollm2-135m-instruct", cluster(gpus=1), Rates())
    assert plan.student_from == "plan.json"
    assert plan.job.student.params == made.student_params.total
    assert plan.job.student.ffn == 512


@pytest.mark.parametrize(("targets", "sizes"), [("topk", {1, 2, 4, 8}), ("sampled", {1}), ("full", {1})])
def test_layers_are_shared_only_for_targets_that_shares_of_a_head_can_make(
    targets: str, sizes: set[int], tmp_path: Path
) -> None:
    objective = f"distill.objectives=[{{name: token_divergence, targets: {targets}}}]"
    config = load_config(find_config("llama3.1-8b-to-4.5b-width"), [f"run_dir={tmp_path}", objective])
    tiny = replace(cluster(host=8), gpu=replace(H100, memory=8 * GIB))
    plan = plan_cluster(config, TEACHERS / "Llama-3.1-8B", tiny, Rates(), stages=(2,), placements=("replicated",))
    assert {one.setting.tensor for one in plan.settings} == sizes


def test_gpus_are_known_by_name() -> None:
    assert {"a100-40", "a100-80", "h100", "h200", "b200", "mi300x"} <= set(known_gpus())
    with pytest.raises(ConfigError, match="a100-40, a100-80"):
        find_gpu("h1000")


def test_layers_are_shared_only_where_nothing_fits_otherwise() -> None:
    fitting = compare(job(), cluster(), 256, Rates(), tensor=(2, 4))
    assert {one.setting.tensor for one in fitting} == {1}
    found = compare(job(seq_len=98_304), cluster(), 8, Rates(), placements=("replicated",), tensor=(2, 4, 8))
    assert not any(one.fits for one in found if one.setting.tensor == 1)
    chosen = found[0]
    assert chosen.fits
    assert chosen.setting.tensor == 2  # the fewest that fit
    assert chosen.setting.micro_batch * chosen.setting.accumulation * 8 // chosen.setting.tensor == 8


def test_ranks_that_share_layers_hold_less_and_wait_for_each_other() -> None:
    alone, two = (Setting(2, 1, 1, OFF, "replicated", tensor=size) for size in (1, 2))
    one, half = (peak_memory(job(), setting).parts for setting in (alone, two))
    assert half["student weights"] == pytest.approx(one["student weights"] / 2, rel=1e-3)
    assert half["teacher"] == pytest.approx(one["teacher"] / 2, rel=1e-3)
    assert half["masters and Adam"] == pytest.approx(one["masters and Adam"], rel=1e-3)  # over all ranks either way
    assert one["activations"] / 2 < half["activations"] < one["activations"]  # hidden states and norms are whole
    fast, slow = (estimate_step(job(), setting, cluster(), Rates()) for setting in (alone, two))
    assert slow.seconds["student"] == pytest.approx(fast.seconds["student"] / 2, rel=1e-3)
    weights = job().item_bytes * job().student.params
    assert tensor_parallel_seconds(job(), alone, cluster()) == 0
    assert slow.seconds["communication"] > cluster().collective(weights / 2) * 2 / Rates().links  # ZeRO's part of it
    assert slow.tokens_per_second < fast.tokens_per_second


def test_sequences_are_shared_only_where_nothing_fits_otherwise() -> None:
    fitting = compare(job(), cluster(), 256, Rates(), sequence=(2, 4), tensor=(2, 4))
    assert {(one.setting.sequence, one.setting.tensor) for one in fitting} == {(1, 1)}
    found = compare(job(seq_len=196_608), cluster(), 8, Rates(), sequence=(2, 4, 8), tensor=(2,))
    assert not any(one.fits for one in found if one.setting.sequence == 1)
    assert found[0].fits
    assert found[0].setting.tensor == 1
    assert found[0].setting.micro_batch * found[0].setting.accumulation * 8 // found[0].setting.sequence == 8


def test_ranks_that_share_sequences_hold_fewer_activations_and_exchange_them() -> None:
    alone, two = (Setting(3, 1, 1, OFF, "replicated", sequence=size) for size in (1, 2))
    one, half = (peak_memory(job(), setting).parts for setting in (alone, two))
    assert half["student weights"] == one["student weights"]  # over all ranks either way
    assert half["activations"] == one["activations"] / 2
    fast, slow = (estimate_step(job(), setting, cluster(), Rates()) for setting in (alone, two))
    assert sequence_parallel_seconds(job(), alone, cluster()) == 0
    assert slow.seconds["communication"] > fast.seconds["communication"]
    assert fast.tokens_per_second > slow.tokens_per_second > fast.tokens_per_second / 2
