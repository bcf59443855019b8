"""Several teachers in whole distillations: over ranks, ZeRO stages, placements and a resume."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kdscale.config.data import DataConfig, SourceConfig
from kdscale.config.root import Config
from kdscale.data.token_store import TokenStore
from kdscale.distill import engine
from kdscale.distill.trainer import Trainer
from kdscale.errors import CheckpointError, ConfigError, Interrupted
from kdscale.models.loading import load_tokenizer
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter

TOKENS = 4 * 4 * 48


@pytest.fixture(scope="module")
def data_dir(tiny_llama_dir: Path, tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two sources with tags of their own; every micro-batch of two sequences has documents of either or of both."""
    folder, sources = tmp_path_factory.mktemp("tagged"), []
    for tag, texts in (("even", tiny_texts[::2]), ("odd", tiny_texts[1::2])):
        path = folder / f"{tag}.jsonl"
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        sources.append(SourceConfig(path=str(path), tag=tag))
    data = DataConfig(sources=tuple(sources), heldout_fraction=0.2)
    TokenStore.build(folder / "store", data, load_tokenizer(tiny_llama_dir), eos_id=0, reporter=Reporter(quiet=True))
    return folder / "store"


@pytest.fixture(scope="module")
def other_teacher(student_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Another model of the same tokenizer: one layer fewer, and a head that says something else."""
    folder = tmp_path_factory.mktemp("other") / "teacher"
    folder.mkdir()
    for file in student_dir.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"] = tensors["model.norm.weight"].flip(0) * 1.5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def run(
    tiny_llama_dir: Path, student_dir: Path, data_dir: Path, make_config: Callable[..., Config]
) -> Callable[..., list[dict[str, Any]]]:
    def run(run_dir: Path, **settings: Any) -> list[dict[str, Any]]:
        engine.run(
            make_config(tokens=TOKENS, **settings), teacher_dir=tiny_llama_dir, student_dir=student_dir,
            data_dir=data_dir, run_dir=run_dir, reporter=Reporter(quiet=True),
        )  # fmt: skip
        return list(read_metrics(run_dir / "logs" / "metrics.jsonl"))

    return run


def losses(rows: list[dict[str, Any]]) -> list[float]:
    return [row["loss"] for row in rows]


def test_a_mixture_of_one_teacher_with_itself_is_that_teacher(
    run: Callable[..., Any], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    alone = run(tmp_path / "alone")
    teachers = [{"name": "own"}, {"name": "again", "path": str(tiny_llama_dir), "weight": 2.0}]
    twice = run(tmp_path / "twice", teachers=teachers)
    assert losses(twice) == pytest.approx(losses(alone), abs=1e-5)
    assert "own (weight 1), again (weight 2)" in (tmp_path / "twice" / "student" / "README.md").read_text()


def by_tag(other: Path, *placements: str) -> list[dict[str, Any]]:
    """One for each source and one for both, so that some rows have two teachers and some micro-batches none of one."""
    own, even, both = placements
    return [
        {"name": "own", "teacher_placement": own, "tags": ["odd"]},
        {"name": "other", "path": str(other), "teacher_placement": even, "tags": ["even"]},
        {"name": "both", "path": str(other), "teacher_placement": both, "weight": 0.5, "tags": ["odd"]},
    ]


# name → settings of ranks that share the work, and where the three teachers are
SHARED: dict[str, tuple[dict[str, Any], tuple[str, str, str]]] = {
    "data": ({"processes": 2, "zero_stage": 3, "micro_batch": 1}, ("partitioned", "partitioned", "offloaded")),
    "sequence": ({"processes": 2, "sequence_parallel": 2}, ("replicated", "partitioned", "replicated")),
    "tensor": ({"processes": 2, "tensor_parallel": 2}, ("replicated", "partitioned", "offloaded")),
}


# its average is made by every rank and written by all of them
AVERAGE: dict[str, Any] = {
    "teachers": [{"name": "own"}, {"name": "average", "teacher_placement": "ema", "ema": {"decay": 0.8}}]
}


@pytest.fixture(scope="module")
def whole(
    run: Callable[..., Any], other_teacher: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    return list(run(tmp_path_factory.mktemp("one"), zero_stage=0, teachers=by_tag(other_teacher, *3 * ["replicated"])))


@pytest.fixture(scope="module")
def shared(
    tiny_llama_dir: Path, student_dir: Path, data_dir: Path, make_config: Callable[..., Config], other_teacher: Path,
    tmp_path_factory: pytest.TempPathFactory, run_parallel: Callable[..., None],
) -> Path:  # fmt: skip
    """The folder of the runs of several ranks, made by one process that forks them."""
    folder, runs = tmp_path_factory.mktemp("shared"), []
    places = {"teacher_dir": str(tiny_llama_dir), "student_dir": str(student_dir), "data_dir": str(data_dir)}
    for name, (settings, placements) in SHARED.items():
        config = make_config(tokens=TOKENS, **settings, teachers=by_tag(other_teacher, *placements))
        phases = [{"config": config.resolved(), "until": None}]
        runs.append({"run_dir": str(folder / name), "phases": phases, **places})
    # two ranks that are killed in step 2, and one that goes on
    changing = ({"processes": 2, "zero_stage": 2, "checkpoint_every": 1}, 1), ({"zero_stage": 1}, None)
    phases = [
        {"config": make_config(tokens=TOKENS, **AVERAGE, **more).resolved(), "until": until} for more, until in changing
    ]
    runs.append({"run_dir": str(folder / "average"), "phases": phases, **places})
    run_parallel(folder, runs)
    return folder


@pytest.mark.parametrize("name", SHARED)
def test_ranks_stages_and_placements_change_nothing(shared: Path, whole: list[dict[str, Any]], name: str) -> None:
    """A partitioned teacher is asked by all ranks together, also where one of them has no row for it."""
    rows = list(read_metrics(shared / name / "logs" / "metrics.jsonl"))
    assert losses(rows) == pytest.approx(losses(whole), abs=2e-5)


def test_the_average_of_two_ranks_is_that_of_one_which_goes_on(
    shared: Path, run: Callable[..., Any], tmp_path: Path
) -> None:
    rows = list(read_metrics(shared / "average" / "logs" / "metrics.jsonl"))
    assert losses(rows) == pytest.approx(losses(run(tmp_path, **AVERAGE, checkpoint_every=1)), abs=2e-5)


def test_a_killed_run_goes_on(
    run: Callable[..., Any], whole: list[dict[str, Any]], other_teacher: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    one_step = Trainer._one_step

    def stop(self: Trainer, step: int, *args: Any) -> None:
        if step == 2:
            raise Interrupted(15)
        one_step(self, step, *args)

    teachers = by_tag(other_teacher, "replicated", "offloaded", "replicated")
    settings = {"zero_stage": 1, "checkpoint_every": 1, "teachers": teachers}
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "_one_step", stop)
        with pytest.raises(Interrupted):
            run(tmp_path, **settings)
    assert losses(run(tmp_path, **settings)) == pytest.approx(losses(whole), abs=2e-5)


def test_what_does_not_belong_together_is_refused_by_name(
    run: Callable[..., Any], other_teacher: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match="no teacher teaches even"):
        run(tmp_path / "untaught", teachers=[{"name": "own", "tags": ["odd"]}])
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    for file in other_teacher.iterdir():
        (foreign / file.name).write_bytes(file.read_bytes())
    tokenizer = json.loads((foreign / "tokenizer.json").read_text())
    tokenizer["added_tokens"][0]["content"] = "<|stop|>"
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["<|stop|>"] = vocabulary.pop("<|end|>")
    (foreign / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(
        CheckpointError, match=f"{foreign}: the tokens that begin and end a text(.|\n)*below the model's 320 rows"
    ):
        run(tmp_path / "other", teachers=[{"name": "own"}, {"name": "x", "path": str(foreign)}])
    with pytest.raises(ConfigError, match=r"distill\.teachers \(x\): path.*\n.*\n.*no such folder"):
        run(tmp_path / "nowhere", teachers=[{"name": "x", "path": str(tmp_path / "nothing")}])
