"""The data stage: what the config's switches do to the store, and an unusable added token."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing

from kdscale.cli.models import export_megatron_command
from kdscale.config.data import SourceConfig
from kdscale.config.load import build_config
from kdscale.config.root import Config
from kdscale.data.sources import read_documents
from kdscale.data.token_store import TokenStore
from kdscale.errors import ConfigError, DataError
from kdscale.pipeline.checks import check_teacher
from kdscale.pipeline.stage import StageContext
from kdscale.pipeline.stages.data import check_enough_text, tokenize
from kdscale.runs.folder import RunFolder
from kdscale.runtime.progress import Reporter


@pytest.fixture
def teacher(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """The tiny teacher, whose tokenizer begins a text with <|end|>, and has an added token beyond the embedding."""
    folder = tmp_path / "teacher"
    shutil.copytree(tiny_llama_dir, folder)
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="<|end|> $A", special_tokens=[("<|end|>", 0)])
    tokenizer.add_tokens(["<image>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def context_of(tmp_path: Path, teacher: Path, texts: list[str], **data: Any) -> StageContext:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tree = {
        "name": "t",
        "run_dir": str(tmp_path / "run"),
        "teacher": {"path": str(teacher)},
        "prune": {"ffn": 64},
        "data": {"sources": [{"path": str(path)}], "heldout_fraction": 0.2, **data},
    }
    run = RunFolder(tmp_path / "run")
    run.path.mkdir(exist_ok=True)
    return StageContext(build_config(tree, "here"), run, teacher, Reporter(quiet=True))


@pytest.mark.parametrize(("add_special", "prefix"), [("auto", (0,)), ("never", ())])
def test_documents_begin_as_the_tokenizer_begins_them(tmp_path, teacher, tiny_texts, add_special, prefix):
    context = context_of(tmp_path, teacher, tiny_texts, add_special=add_special)
    tokenize(context)
    store = TokenStore.open(context.run.data)
    assert store.split("train").prefix_ids == store.split("heldout").prefix_ids == prefix
    assert all(store.split("train").document_tokens(i)[0] for i in range(3)), "the prefix is not stored"


def test_text_is_shared_unless_switched_off(tmp_path, teacher, tiny_texts, monkeypatch):
    monkeypatch.setenv("KDSCALE_CACHE", str(tmp_path / "cache"))
    tokenize(context_of(tmp_path, teacher, tiny_texts, share=False))
    assert not (tmp_path / "cache").exists()
    tokenize(context_of(tmp_path, teacher, tiny_texts))
    assert len(list((tmp_path / "cache" / "tokens").iterdir())) == 1


def test_a_blend_says_how_often_each_source_is_read(tmp_path, teacher, tiny_texts, monkeypatch):
    (tmp_path / "b.txt").write_text(tiny_texts[0])
    (tmp_path / "h.txt").write_text(tiny_texts[1])
    sources = [{"path": str(tmp_path / "a.jsonl"), "tag": "much"}, {"path": str(tmp_path / "b.txt"), "tag": "little"}]
    context = context_of(
        tmp_path, teacher, tiny_texts[2:], sources=sources, heldout_sources=[{"path": str(tmp_path / "h.txt")}],
        blend={"weights": {"much": 3, "little": 1}},
    )  # fmt: skip
    said: list[str] = []
    monkeypatch.setattr(context.reporter, "say", said.append)
    tokenize(context)
    split = TokenStore.open(context.run.data).split("train")
    size = int(split.lengths[split.sources_D == 1].sum()) + 1
    times = 0.25 * context.config.distill.tokens / size
    assert any(
        line.startswith(f"  25.0% of the training is little: {size:,} tokens, read {times:,.2f} times") for line in said
    )
    assert sum("teach little that is new" in line for line in said) == 2

    def with_length(seq_len: int) -> Config:
        importance = context.config.importance.model_copy(update={"seq_len": 8, "calibration_tokens": 8})
        distill = context.config.distill.model_copy(update={"seq_len": seq_len})
        return context.config.model_copy(update={"importance": importance, "distill": distill})

    check_enough_text(with_length(size), split)
    with pytest.raises(DataError, match=f"little has {size}"):
        check_enough_text(with_length(size + 1), split)


def test_a_blend_must_name_every_source(tmp_path, teacher, tiny_texts):
    for weights, words in (
        ({"other": 1}, "no source has the tag"),
        ({str(tmp_path / "a.jsonl"): -1}, "greater than 0"),
    ):
        with pytest.raises(ConfigError, match=words):
            context_of(tmp_path, teacher, tiny_texts, blend={"weights": weights})
    two = [{"path": str(tmp_path / "a.jsonl"), "weight": 2}, {"path": "b.txt"}]
    for weights, words in (
        ({"b.txt": 1}, "weight for each source"),
        ({"b.txt": 1, two[0]["path"]: 1}, "number of repeats"),
    ):
        with pytest.raises(ConfigError, match=words):
            context_of(tmp_path, teacher, tiny_texts, sources=two, blend={"weights": weights})


def test_a_store_goes_to_megatron_and_comes_back(tmp_path, teacher, tiny_texts):
    context = context_of(tmp_path, teacher, tiny_texts)
    tokenize(context)
    (tmp_path / "run" / "config.yaml").touch()
    export_megatron_command(str(tmp_path / "run"), tmp_path / "set")
    split = TokenStore.open(context.run.data).split("train")
    documents = read_documents(SourceConfig(path=str(tmp_path / "set.idx")))
    assert [d.ids.tolist() for d in documents] == [split.document_tokens(i).tolist() for i in range(split.documents)]


def test_an_added_token_beyond_the_embedding_matters_only_in_text(tmp_path, teacher, tiny_texts, monkeypatch):
    context = context_of(tmp_path, teacher, tiny_texts)
    said: list[str] = []
    monkeypatch.setattr(context.reporter, "say", said.append)
    check_teacher(context.config, context.reporter)
    assert any("id 320 ('<image>' in tokenizer.json)" in line for line in said)
    tokenize(context)
    with pytest.raises(DataError, match=r"does not belong(.|\n)*id 320 \('<image>'\) in a.jsonl"):
        tokenize(context_of(tmp_path, teacher, [*tiny_texts, "see <image>"]))
