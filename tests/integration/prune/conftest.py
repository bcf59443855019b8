"""Tiny teachers of several kinds, calibration batches and a one-call prune."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kdscale.config.prune import ImportanceConfig, PruneConfig
from kdscale.families import Family, load_family
from kdscale.prune.apply import apply_plan
from kdscale.prune.importance import collect
from kdscale.prune.plan import Plan
from kdscale.prune.search.planning import make_plan
from kdscale.runtime.progress import Reporter
from kdscale.weights import Checkpoint
from tests.integration.prune.family_table import save_teacher

CPU = torch.device("cpu")


class Teacher:
    """An opened tiny checkpoint and what the tests do with it."""

    def __init__(self, folder: Path):
        self.checkpoint = Checkpoint.open(folder)
        self.config: dict[str, Any] = self.checkpoint.config
        self.family: Family = load_family(self.config, str(folder / "config.json"))
        self.checkpoint.verify_against(self.family)
        generator = torch.Generator().manual_seed(5)
        vocab = self.family.dims(self.config).vocab
        # two documents a row, so that a mask that lets them see each other would show
        positions = torch.cat([torch.arange(20), torch.arange(28)]).expand(3, -1)
        self.batches = [
            SimpleNamespace(
                input_ids_BS=torch.randint(0, vocab, (3, 48), generator=generator), position_ids_BS=positions
            )
            for _ in range(2)
        ]
        self.ids = self.batches[0].input_ids_BS[:2]

    def scores(self, out: Path, **prune: Any) -> dict[str, Any]:
        cfg, silent = ImportanceConfig(dtype="float32"), Reporter(quiet=True)
        return collect.score_teacher(
            self.checkpoint, self.family, self.batches, cfg, PruneConfig(**prune), out, CPU, silent
        )

    def prune(self, out: Path, scores: dict[str, Any] | None = None, **prune: Any) -> Plan:
        """Importance, plan and apply into `out`."""
        out.mkdir(parents=True)
        cfg = PruneConfig(**prune)
        found = self.scores(out.parent / f"{out.name}-scores", **prune) if scores is None else scores
        plan = make_plan(self.config, self.family, found, cfg)
        apply_plan(self.checkpoint, self.family, plan, out, cfg, batches=self.batches, reporter=Reporter(quiet=True))
        return plan


@pytest.fixture(scope="session")
def teacher_class() -> type[Teacher]:
    return Teacher


@pytest.fixture(scope="module")
def teacher_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Teacher]:
    """The tiny random teacher of a model type (family_table.py), made once for a file of tests."""
    made: dict[str, Teacher] = {}

    def get(model_type: str) -> Teacher:
        if model_type not in made:
            made[model_type] = Teacher(save_teacher(model_type, tmp_path_factory.mktemp(model_type)))
        return made[model_type]

    return get


@pytest.fixture(scope="session")
def teacher(tiny_llama_dir: Path) -> Teacher:
    return Teacher(tiny_llama_dir)


def _save(folder: Path, model: Any, max_shard_size: str = "5GB") -> Path:
    with torch.no_grad():
        for name, value in model.named_parameters():
            # biases and norms away from 0 and 1, or a forgotten slice of them would not show
            if value.ndim == 1:
                value.add_(torch.randn_like(value) * (0.3 if "bias" in name else 0.1))
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return folder


@pytest.fixture(scope="session")
def other_teachers(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Teacher]:
    """`qwen3` (per-head q/k norms, head_dim not hidden/heads), `biased` (untied Llama with every bias, sharded) and
    `gemma3` (tied, norms before and behind every sublayer)."""
    from transformers import (
        Gemma3ForCausalLM,
        Gemma3TextConfig,
        LlamaConfig,
        LlamaForCausalLM,
        Qwen3Config,
        Qwen3ForCausalLM,
    )

    shape = {
        "hidden_size": 96,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "initializer_range": 0.12,
        "bos_token_id": 0,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }

    def make(kind: str) -> Teacher:
        torch.manual_seed(3)
        folder = tmp_path_factory.mktemp(kind)
        if kind == "qwen3":
            model: Any = Qwen3ForCausalLM(Qwen3Config(**shape, head_dim=32, tie_word_embeddings=False))
            return Teacher(_save(folder, model))
        if kind == "gemma3":
            return Teacher(_save(folder, Gemma3ForCausalLM(Gemma3TextConfig(**shape, head_dim=16))))
        config = LlamaConfig(**shape, head_dim=16, attention_bias=True, mlp_bias=True, tie_word_embeddings=False)
        return Teacher(_save(folder, LlamaForCausalLM(config), max_shard_size="200KB"))

    return make
