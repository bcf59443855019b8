"""Commands of the tiny model's run, as a user gives them, and deaths of what they start."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.command_line import Commands, Outcome, environment


@pytest.fixture(scope="session")
def kdscale_environment() -> dict[str, str]:
    """The environment in which `python -m kdscale.cli.main` runs from this checkout, on one thread."""
    return environment()


@pytest.fixture
def dies_at_step(monkeypatch: pytest.MonkeyPatch) -> Callable[..., AbstractContextManager[None]]:
    """`with dies_at_step(5): ...`: the distillation in the block is killed before its step 5, and the block ends so."""
    from kdscale.distill.trainer import Trainer

    @contextmanager
    def dies(step: int, death: type[BaseException] = ZeroDivisionError) -> Iterator[None]:
        one_step = Trainer._one_step

        def step_or_death(self: Trainer, number: int, *args: Any) -> Any:
            if number == step:
                raise death(15)
            return one_step(self, number, *args)

        with monkeypatch.context() as patch, pytest.raises(death):
            patch.setattr(Trainer, "_one_step", step_or_death)
            yield

    return dies


@pytest.fixture(scope="session")
def kdscale(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Outcome]]:
    """`kdscale("run", config)` → exit code and what was printed, by a process that command_server.py forks."""
    commands = Commands(tmp_path_factory.mktemp("printed"))
    yield commands.call
    commands.close()


TINY_CONFIG = """
name: tiny
run_dir: {folder}/run
teacher: {{path: {teacher}}}
data: {{sources: [{{path: {folder}/text}}], heldout_fraction: 0.2}}
importance: {{calibration_tokens: 512, seq_len: 64, micro_batch: 2, dtype: float32}}
prune: {{ffn: 64, heads: 4}}
distill:
  tokens: 2560
  seq_len: 64
  global_batch: 4
  micro_batch: 2
  dtype: float32
  optimizer: {{lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 2}}
  objectives: [{{name: token_divergence, top_k: 16}}]
  validate_every: 5
  validate_tokens: 128
  checkpoint_every: 3
eval:
  tokens: 256
  seq_len: 64
  micro_batch: 2
  prompts: ["The river"]
  sample_tokens: 4
  speed: {{batch_sizes: [1], context_lengths: [16], new_tokens: 4, repeats: 2, max_batch_size: 2}}
"""


@pytest.fixture
def tiny_config(tmp_path: Path, tiny_llama_dir: Path, tiny_texts: list[str]) -> Path:
    """A config for the tiny model and the tiny texts in `tmp_path`; its run folder is `tmp_path/run`."""
    (tmp_path / "text").mkdir()
    for index, text in enumerate(tiny_texts):
        (tmp_path / "text" / f"{index:02d}.txt").write_text(text, encoding="utf-8")
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY_CONFIG.format(folder=tmp_path, teacher=tiny_llama_dir), encoding="utf-8")
    return path


@pytest.fixture
def dies_when_a_checkpoint_is_sealed(monkeypatch: pytest.MonkeyPatch) -> Callable[[], AbstractContextManager[None]]:
    """A block in which the first checkpoint that is sealed ends what runs, as Ctrl-C would."""
    from kdscale.distill.checkpoint import folder as checkpoint_folder

    @contextmanager
    def block() -> Iterator[None]:
        seal = checkpoint_folder.seal

        def seal_and_die(folder: Path, step: int, facts: Any) -> Path:
            seal(folder, step, facts)
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint_folder, "seal", seal_and_die)
            with pytest.raises(KeyboardInterrupt):
                yield

    return block
