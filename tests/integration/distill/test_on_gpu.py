"""Distillation on a GPU, a fake one: no step mixes devices, the student is that of a CPU, and the host waits once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from kdscale.config.distill.objectives import OBJECTIVES
from kdscale.config.distill.targets import placements, source_of
from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.distill import engine
from kdscale.distill.replay import replay
from kdscale.distill.trainer import Trainer
from kdscale.errors import TrainingError
from kdscale.models.loading import load_model
from kdscale.pipeline.stage import StageContext
from kdscale.pipeline.stages.targets import write_targets
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.device import tensors_in
from kdscale.runtime.progress import Reporter
from kdscale.teacher.messages import Question, decode_targets
from kdscale.teacher.online import OnlineTeacher
from kdscale.teacher.server import TeacherService
from kdscale.teacher.source import MicroBatch
from kdscale.teacher.targets import Targets
from tests.fake_gpu.cuda import fake_gpu
from tests.fake_gpu.engine import PlainEngine, make_plain_engine
from tests.fake_gpu.tensors import GPU
from tests.teacher_service import TOKEN

# Settings with which a row of the table is tried, where its defaults are not all there is to it.
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "token_divergence": [
        {"top_k": 16, "ce_weight": 0.2},
        {"targets": "full", "divergence": "jsd"},
        {"targets": "sampled", "draws": 12},
    ],
    "attention": [{"compare": ["query", "map"]}],
}
SHORT = {"zero_stage": 0, "tokens": 3 * 4 * 48, "validate_every": 3, "validate_tokens": 100, "checkpoint_every": 1}
TRIED = [{"name": name, **more} for name in OBJECTIVES for more in SETTINGS.get(name, [{}])]


def learning(entry: dict[str, Any]) -> dict[str, Any]:
    """The fields of distill with which a row of the table is learnt from."""
    if not OBJECTIVES[entry["name"]].only_own_text:
        return {"objectives": [entry]}
    writing = {"every": 2, "prompt_tokens": 8, "max_new_tokens": 6, "validate_prompts": 3}
    return {"on_policy": {"objectives": [entry], **writing}}


class Killed(BaseException):
    """What a kill is to the code: nothing that it could catch."""


@pytest.fixture
def config(make_config: Callable[..., Config], tmp_path: Path) -> Callable[..., Config]:
    """A config for the GPU; keywords are fields of distill."""

    def make(**settings: Any) -> Config:
        tree = make_config(**{**SHORT, **settings}).resolved()
        return build_config({**tree, "runtime": {**tree["runtime"], "device": "cuda"}}, "test")

    return make


@pytest.fixture
def train(
    tiny_llama_dir: Path, student_dir: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Path]:
    """A whole distillation in this process, with the plain engine; returns the student's weights."""
    monkeypatch.setattr(engine, "make_engine", make_plain_engine)
    monkeypatch.setattr(engine, "join_group", lambda *_: None)

    def run(cfg: Config, run_dir: Path) -> Any:
        engine.run(cfg, teacher_dir=tiny_llama_dir, student_dir=student_dir, data_dir=data_dir, run_dir=run_dir,
                   reporter=Reporter(quiet=True))  # fmt: skip
        return load_file(run_dir / "student" / "model.safetensors")

    return run


@pytest.fixture(scope="module")
def by_deepspeed(distil: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Any]:
    """The student that the real engine makes on the CPU, once for each objective and each teacher."""
    made: dict[tuple[str, str], Any] = {}

    def get(objective: dict[str, Any], placement: str) -> Any:
        teacher = placement if source_of(placement).follows_student else "replicated"
        if (str(objective), teacher) not in made:
            folder = tmp_path_factory.mktemp("cpu")
            distil(folder, **learning(objective), teacher_placement=teacher, **SHORT)
            made[str(objective), teacher] = load_file(folder / "student" / "model.safetensors")
        return made[str(objective), teacher]

    return get


def same_weights(left: Any, right: Any, may_differ: float = 0.0) -> None:
    """`may_differ`: a share of the values, of which a draw that fell to the next token changed the gradient."""
    assert left.keys() == right.keys()
    off = {name: int(((left[name] - right[name]).abs() > 1e-4).sum()) for name in left}
    assert sum(off.values()) <= may_differ * sum(value.numel() for value in left.values()), off


@pytest.fixture
def placement_settings(
    service: str, endpoint: str, cached_run: Callable[..., StageContext], tmp_path: Path
) -> Callable[[str], dict[str, Any]]:
    token_file = tmp_path / "token"
    token_file.write_text(TOKEN + "\n")
    settings: dict[str, dict[str, Any]] = {
        "served": {"served": {"urls": [service], "token_file": str(token_file)}},
        "endpoint": {"endpoint": {"base_url": endpoint, "model": "tiny"}},
    }

    def of(placement: str) -> dict[str, Any]:
        if placement == "cached":
            exact = {"codec": {"name": "hidden", "dtype": "float32"}, "path": str(tmp_path / "store")}
            write_targets(cached_run(tmp_path / "writer", exact, **SHORT))
            return {"teacher_placement": placement, "targets": exact}
        return {"teacher_placement": placement, **settings.get(placement, {})}

    return of


NEED_A_SECTION = ("preference", "uld")


def pairs() -> list[Any]:
    """Every entry of TRIED with the first placement that gives what it needs, every placement with the first entry."""
    fits = [
        (entry, placement)
        for entry in TRIED
        for placement in placements()
        # sources and objectives of a section of their own: tests/integration/responses, test_lora, test_preferences
        if placement not in ("responses", "base")
        and entry["name"] not in NEED_A_SECTION
        and not OBJECTIVES[entry["name"]](**entry).needs.missing_from(source_of(placement).gives)
    ]
    found = []
    for number, (entry, placement) in enumerate(fits):
        before = fits[:number]
        if all(entry != other for other, _ in before) or all(placement != other for _, other in before):
            found.append(pytest.param(entry, placement, id="-".join(map(str, (*entry.values(), placement)))))
    return found


@pytest.mark.parametrize(("objective", "placement"), pairs())
def test_every_objective_learns_from_every_source(
    objective, placement, config, train, by_deepspeed, placement_settings, tmp_path, monkeypatch
):
    """Killed and resumed on the way."""
    cfg = config(**learning(objective), **placement_settings(placement), async_checkpoints=True)
    one_step = Trainer._one_step
    died = []

    def step_or_death(self: Trainer, step: int, *args: Any) -> Any:
        if step == 2 and not died:
            died.append(step)
            raise Killed
        return one_step(self, step, *args)

    monkeypatch.setattr(Trainer, "_one_step", step_or_death)
    with fake_gpu():
        with pytest.raises(Killed):
            train(cfg, tmp_path / "gpu")
        student = train(cfg, tmp_path / "gpu")
    monkeypatch.undo()
    # Adam moves a value whose gradient is next to nothing by the sign of a rounding error
    may_differ = 0.05 if objective.get("targets") == "sampled" else 1e-5
    # the log-probabilities of what was written are kept in five digits; one row a document makes few gradients large
    if OBJECTIVES[objective["name"]].only_own_text or OBJECTIVES[objective["name"]].of_classes:
        may_differ = 1e-4
    same_weights(student, by_deepspeed(objective, placement), may_differ)


# The sums of a step come to the host once. At ZeRO stage 0 our own optimiser looks at the norm, too.
WAITS_OF_A_STEP = {"_over_ranks": 1, "step": 1}


SEVERAL = {"teachers": [{"name": "own"}, {"name": "average", "teacher_placement": "ema"}]}


@pytest.mark.parametrize(
    ("micro_batch", "objective", "more"),
    [
        (2, TRIED[0], {}),
        # a student that writes text waits for every token
        # and one of sentences has their borders counted on the host
        *(
            (4, entry, {})
            for entry in TRIED
            if not OBJECTIVES[entry["name"]].only_own_text
            and entry["name"] not in (*NEED_A_SECTION, "sentence_embeddings")
        ),
        (4, TRIED[0], SEVERAL),
    ],
    ids=lambda entry: (
        None if isinstance(entry, int)
        else "-".join(map(str, entry.values())) if "name" in entry else "several" if entry else ""
    ),
)  # fmt: skip
def test_the_host_waits_once_a_step_and_for_no_micro_batch(
    objective, more, micro_batch, config, train, tmp_path, monkeypatch
):
    seen: list[Counter[str]] = []
    one_step = Trainer._one_step

    with fake_gpu() as syncs:

        def counted(self: Trainer, *args: Any) -> Any:
            syncs.clear()
            result = one_step(self, *args)
            seen.append(syncs.by_function())
            return result

        monkeypatch.setattr(Trainer, "_one_step", counted)
        settings = {"tokens": 2 * 4 * 48, "micro_batch": micro_batch, "gradient_checkpointing": micro_batch == 4}
        train(config(objectives=[objective], **settings, **more), tmp_path / "run")
    assert seen == [WAITS_OF_A_STEP] * 2


def test_the_teacher_looks_ahead_on_a_stream_of_its_own(config, train, tmp_path, monkeypatch):
    """Each stream waits for what it reads, memory that crosses is marked, and the student is the same."""
    targets_of, forward, backward = OnlineTeacher.targets, PlainEngine.__call__, PlainEngine.backward
    settings = {"objectives": [TRIED[0]], "tokens": 4 * 48, "micro_batch": 1}
    crossed: list[tuple[MicroBatch, Targets]] = []
    sides: list[Any] = []

    def targets(self: OnlineTeacher, batch: MicroBatch) -> Targets:
        note("teacher")
        found = targets_of(self, batch)
        if torch.cuda.current_stream().name == "side":
            crossed.append((batch, found))
            sides.append(torch.cuda.current_stream())
        return found

    def student(self: PlainEngine, batch: MicroBatch, found: Targets) -> Any:
        note("student")
        main = torch.cuda.current_stream()
        if any(found is given for _, given in crossed):
            assert addresses(found) <= set(main.recorded)
        return forward(self, batch, found)

    def back(self: PlainEngine, *args: Any, **more: Any) -> None:
        note("backward")
        backward(self, *args, **more)

    with fake_gpu() as syncs:

        def note(what: str) -> None:
            syncs.streams.append(f"{what} on {torch.cuda.current_stream().name}")

        alone = train(config(**settings), tmp_path / "alone")
        for owner, name, function in (
            (OnlineTeacher, "targets", targets), (PlainEngine, "__call__", student), (PlainEngine, "backward", back)
        ):  # fmt: skip
            monkeypatch.setattr(owner, name, function)
        same_weights(train(config(**settings, teacher_overlap=True), tmp_path / "ahead"), alone)
    assert len(crossed) == 3
    assert all(addresses(batch) <= set(side.recorded) for side, (batch, _) in zip(sides, crossed, strict=True))
    first = syncs.streams.index("side waits for main")
    ahead = ["side waits for main", "teacher on side", "backward on main", "main waits for side", "student on main"]
    assert syncs.streams[first - 2 : first + 16] == [
        "teacher on main", "student on main", *ahead * 3, "backward on main"
    ]  # fmt: skip


def addresses(value: Any) -> set[int]:
    """Of the tensors on the GPU, which another stream must not take the memory of."""
    return {tensor.data_ptr() for tensor in tensors_in(value) if tensor.is_cuda}


def test_a_replayed_step_is_that_of_the_run(config, train, tiny_llama_dir, student_dir, data_dir, tmp_path):
    cfg = config(objectives=[TRIED[0]], tokens=2 * 4 * 48)
    folders = engine.Folders(tiny_llama_dir, student_dir, data_dir, tmp_path / "run")
    with fake_gpu():
        train(cfg, tmp_path / "run")
        found = replay(cfg, folders, 2, max_steps=4, nearest=False, reporter=Reporter(quiet=True))
    rows = [row for row in read_metrics(tmp_path / "run" / "logs" / "metrics.jsonl") if row["kind"] == "train"]
    assert found["loss"] == pytest.approx(rows[1]["loss"], rel=1e-6)
    assert found["grad_norm"] == pytest.approx(rows[1]["grad_norm"], rel=1e-4)


def test_where_a_loss_stops_being_finite_is_found(config, train, student_dir, tmp_path, monkeypatch):
    cfg = config(objectives=[TRIED[0]], guard={"max_skipped_in_a_row": 1}, optimizer={"lr": 10.0, "warmup_steps": 0})
    load = engine.load

    def with_nan(*args: Any) -> Any:
        models = load(*args)
        with torch.no_grad():
            models.student.model.model.layers[1].mlp.down_proj.weight[0, 0] = torch.nan
        return models

    monkeypatch.setattr(engine, "load", with_nan)
    with fake_gpu(), pytest.raises(TrainingError) as caught:
        train(cfg, tmp_path / "run")
    assert "layers.1.mlp.down_proj" in str(caught.value)


def test_a_service_answers_from_a_gpu(tiny_llama_dir):
    ids_BS, positions_BS = torch.arange(24).reshape(2, 12), torch.arange(12).expand(2, -1)
    question = Question(ids_BS, positions_BS, torch.tensor([3, 11, 20])).encode()

    def answer(device: torch.device) -> Any:
        model = load_model(tiny_llama_dir, dtype=torch.float32, device=device)
        service = TeacherService(model, tiny_llama_dir, device=device, max_tokens=4096, max_length=1024)
        body = service.answer(question, 5, 1.0, 320)
        return decode_targets(body, rows=3, temperature=1.0, vocab_size=320, top_k=5)

    expected = answer(torch.device("cpu"))
    with fake_gpu():
        got = answer(GPU)
    assert torch.equal(got.ids_NK, expected.ids_NK)
    torch.testing.assert_close(got.logits_NK, expected.logits_NK)
