"""A distillation on chats and text in a blend, short sequences first, that is interrupted and goes on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from kdscale.config.data import BlendConfig, DataConfig, SourceConfig
from kdscale.data.token_store import TokenStore
from kdscale.distill import engine
from kdscale.distill import trainer as loop
from kdscale.errors import Interrupted
from kdscale.models.loading import load_tokenizer
from kdscale.runs.metrics_log import read_metrics
from kdscale.runtime.progress import Reporter

TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|end|>{% endfor %}"


@pytest.fixture(scope="module")
def blend_dir(tiny_llama_dir: Path, tiny_texts: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("blend")
    chats = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}]}
        for text in tiny_texts[:30]
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps(chat) + "\n" for chat in chats))
    (folder / "plain.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in tiny_texts[30:]))
    (folder / "chat.jinja").write_text(TEMPLATE)
    data = DataConfig(
        sources=(
            SourceConfig(path=str(folder / "chat.jsonl"), chat=True, tag="chat"),
            SourceConfig(path=str(folder / "plain.jsonl"), tag="plain"),
        ),
        blend=BlendConfig(weights={"chat": 0.6, "plain": 0.4}),
        chat_template=str(folder / "chat.jinja"),
        heldout_fraction=0.2,
    )
    tokenizer, quiet = load_tokenizer(tiny_llama_dir), Reporter(quiet=True)
    TokenStore.build(folder / "store", data, tokenizer, eos_id=0, reporter=quiet)
    return folder / "store"


def test_interrupted_and_resumed_it_ends_with_the_same_bytes(
    make_config, tiny_llama_dir, student_dir, blend_dir, tmp_path, monkeypatch
):
    config = make_config(shorter_first=[{"seq_len": 12, "until": 0.3}, {"seq_len": 24, "until": 0.7}])

    def run(name: str) -> bytes:
        engine.run(
            config, teacher_dir=tiny_llama_dir, student_dir=student_dir, data_dir=blend_dir, run_dir=tmp_path / name,
            reporter=Reporter(quiet=True),
        )  # fmt: skip
        return (tmp_path / name / "student" / "model.safetensors").read_bytes()

    whole = run("whole")
    shapes: list[tuple[int, ...]] = []
    real = loop.train_step

    def stops_in_step_4(engine_, source, batches, *rest):
        shapes.append(tuple(batches[0].input_ids_BS.shape))
        if len(shapes) == 4:
            raise KeyboardInterrupt
        return real(engine_, source, batches, *rest)

    with monkeypatch.context() as patch, pytest.raises((Interrupted, KeyboardInterrupt)):
        patch.setattr(loop, "train_step", stops_in_step_4)
        run("cut")
    assert shapes == [(8, 12), (8, 12), (4, 24), (4, 24)]
    assert run("cut") == whole
    rows = [row for row in read_metrics(tmp_path / "cut" / "logs" / "metrics.jsonl") if row["kind"] == "train"]
    assert {row["step"] for row in rows} == set(range(1, 9))
    assert all(0 < row["labels"] < 4 * 48 for row in rows), "the questions are no labels"
    assert torch.isfinite(torch.tensor([row["loss"] for row in rows])).all()
