"""A tiny teacher, a student with one layer fewer in bf16 and fp32, a token store, and short ways to run them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from kdscale.config.data import DataConfig, SourceConfig
from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.data.token_store import TokenStore
from kdscale.models.loading import load_tokenizer
from kdscale.pipeline.stage import StageContext
from kdscale.runs.folder import RunFolder
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="session")
def student_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher without its last layer, fp32."""
    folder = tmp_path_factory.mktemp("student") / "pruned"
    shutil.copytree(tiny_llama_dir, folder)
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    config.pop("layer_types", None)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = load_file(folder / "model.safetensors")
    kept = {name: value for name, value in tensors.items() if ".layers.3." not in name}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="session")
def narrow_student_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The teacher's upper 64 channels, 4 of its 6 heads and layers 0, 1 and 3, beside the plan that says so."""
    import numpy as np

    from kdscale.config.prune import PruneConfig
    from kdscale.families import load_family
    from kdscale.prune.apply import apply_plan
    from kdscale.prune.search.planning import make_plan
    from kdscale.runs.importance_scores import ImportanceScores
    from kdscale.weights import Checkpoint

    teacher, folder = Checkpoint.open(tiny_llama_dir), tmp_path_factory.mktemp("narrow")
    family = load_family(teacher.config, str(tiny_llama_dir))
    cuts = PruneConfig(hidden=64, heads=4, layers=3, hidden_method="activation", compensate="none")
    scores = {
        "hidden.activation": np.arange(96.0), "heads.output_energy": np.ones((4, 6)),
        "layers.one_by_one": np.array([4.0, 3.0, 1.0, 2.0]),
    }  # fmt: skip
    plan = make_plan(teacher.config, family, ImportanceScores(scores), cuts)
    plan.save(folder / "plan.json")
    (folder / "pruned").mkdir()
    apply_plan(teacher, family, plan, folder / "pruned", cuts)
    return folder / "pruned"


@pytest.fixture(scope="session")
def data_dir(tiny_llama_dir: Path, tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    source = folder / "texts.jsonl"
    source.write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts))
    TokenStore.build(
        folder / "store",
        DataConfig(sources=(SourceConfig(path=str(source)),), heldout_fraction=0.2),
        load_tokenizer(tiny_llama_dir),
        eos_id=0,
        reporter=Reporter(quiet=True),
    )
    return folder / "store"


@pytest.fixture(scope="session")
def make_config(tiny_llama_dir: Path) -> Callable[..., Config]:
    """A config of a short run; keywords are fields of distill, but for the section `targets`."""

    def make(targets: dict[str, Any] | None = None, **distill: Any) -> Config:
        settings = {
            "tokens": 8 * 4 * 48, "seq_len": 48, "global_batch": 4, "micro_batch": 2, "dtype": "float32",
            "optimizer": {"lr": 3e-3, "warmup_steps": 2, "weight_decay": 0.1},
            "objectives": [{"name": "token_divergence", "top_k": 16, "ce_weight": 0.2}],
            "validate_every": 4, "validate_tokens": 200, "checkpoint_every": 3, **distill,
        }  # fmt: skip
        tree = {
            "name": "tiny", "run_dir": "unused", "seed": 5, "teacher": {"path": str(tiny_llama_dir)},
            "prune": {"target_params": "50%"}, "distill": settings, "targets": targets,
            "runtime": {"device": "cpu", "threads": 1},
        }  # fmt: skip
        return build_config(tree, "test")

    return make


@pytest.fixture(scope="session")
def distil(
    tiny_llama_dir: Path, student_dir: Path, data_dir: Path, make_config: Callable[..., Config]
) -> Callable[..., list[dict[str, Any]]]:
    """Run in this process; returns the metrics rows."""

    def run(run_dir: Path, student: Path | None = None, **settings: Any) -> list[dict[str, Any]]:
        from kdscale.distill import engine

        engine.run(
            make_config(**settings), teacher_dir=tiny_llama_dir, student_dir=student or student_dir,
            data_dir=data_dir, run_dir=run_dir, reporter=Reporter(quiet=True),
        )  # fmt: skip
        return list(read_metrics(run_dir / "logs" / "metrics.jsonl"))

    return run


@pytest.fixture
def cached_run(
    make_config: Callable[..., Config], tiny_llama_dir: Path, student_dir: Path, data_dir: Path
) -> Callable[..., StageContext]:
    """A run in `folder` that has its text and its pruned student, ready for the stage `targets`."""

    def make(folder: Path, targets: dict[str, Any], **distill: Any) -> StageContext:
        run = RunFolder(folder)
        run.path.mkdir(exist_ok=True)
        for link, target in ((run.data, data_dir), (run.pruned, student_dir)):
            if not link.exists():
                link.symlink_to(target)
        config = make_config(targets=targets, teacher_placement="cached", **distill)
        return StageContext(config, run, tiny_llama_dir, Reporter(quiet=True))

    return make


@pytest.fixture(scope="module")
def service(tiny_llama_dir: Path) -> Iterator[str]:
    """The address of a running teacher service, on the CPU, that asks for TOKEN."""
    import torch

    from kdscale.models.loading import load_model
    from tests.teacher_service import serving_teacher

    model = load_model(tiny_llama_dir, dtype=torch.float32, device=torch.device("cpu"))
    with serving_teacher(model, tiny_llama_dir, max_length=1024) as (host, port):
        yield f"http://{host}:{port}"


@pytest.fixture(scope="module")
def endpoint(tiny_llama_dir: Path) -> Iterator[str]:
    """The base_url of a running server that scores text with the tiny model, as vLLM does."""
    import torch

    from kdscale.models.loading import load_model
    from tests.fake_endpoint import FakeEndpoint, scores_of, serving

    model = load_model(tiny_llama_dir, dtype=torch.float32, device=torch.device("cpu"))
    with serving(FakeEndpoint(score=scores_of(model))) as running:
        yield running.url


_CHILD = """
import os, sys, json
from pathlib import Path
from kdscale.config.load import build_config
from kdscale.distill import engine
from kdscale.distill.checkpoint import folder
from kdscale.distill.parallel.process_group import leave_group
from kdscale.distill.trainer import Trainer
from kdscale.errors import Interrupted, KdscaleError
from kdscale.runtime.progress import Reporter
tree, teacher, student, data, run_dir, die = json.loads(sys.argv[1])
if die:
    when, step = die
    real_step, real_seal = Trainer._one_step, folder.seal
    def one_step(self, number, *args):
        if when == "step" and number == step: os._exit(77)
        return real_step(self, number, *args)
    def seal(path, number, facts):
        if when == "seal" and number == step: os._exit(77)
        real_seal(path, number, facts)
    def export(*args, **kwargs):
        if when == "export": os._exit(77)
        real_export(*args, **kwargs)
    Trainer._one_step, folder.seal, engine.export_checkpoint = one_step, seal, export
code = 0
try:
    engine.run(build_config(tree, "test"), teacher_dir=Path(teacher), student_dir=Path(student), data_dir=Path(data),
               run_dir=Path(run_dir), reporter=Reporter())
except (KdscaleError, Interrupted) as error:
    print(error, file=sys.stderr)
    code = error.exit_code
leave_group()
os._exit(code)
"""


@pytest.fixture(scope="session")
def run_parallel() -> Callable[..., None]:
    """Run what parallel_worker.py describes, in one process that forks the ranks; its files go into `folder`."""

    def run(folder: Path, runs: list[dict[str, Any]], models: dict[str, str] | None = None) -> None:
        (folder / "jobs.json").write_text(json.dumps({"models": models or {}, "runs": runs}))
        path = os.pathsep.join(str(ROOT / part) for part in (".", "kernels", "launch"))
        done = subprocess.run(
            [sys.executable, Path(__file__).parent / "parallel_worker.py", folder / "jobs.json"],
            capture_output=True, text=True, timeout=280, check=False,
            env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-6000:]

    return run


@pytest.fixture
def spawn(tiny_llama_dir: Path, student_dir: Path, data_dir: Path) -> Callable[..., subprocess.Popen[str]]:
    """The same in a process of its own; `die` is ("step"|"seal"|"export", step) at which it ends without notice."""

    def start(config: Config, run_dir: Path, die: tuple[str, int] | None = None, **env: str) -> subprocess.Popen[str]:
        sent = [config.resolved(), str(tiny_llama_dir), str(student_dir), str(data_dir), str(run_dir), die]
        path = os.pathsep.join(
            [str(ROOT), str(ROOT / "kernels"), str(ROOT / "launch"), os.environ.get("PYTHONPATH", "")]
        )
        return subprocess.Popen(
            [sys.executable, "-c", _CHILD, json.dumps(sent)], text=True, stderr=subprocess.PIPE,
            stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env},
        )  # fmt: skip

    return start
