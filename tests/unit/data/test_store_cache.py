"""Token stores shared between runs: what counts as the same, what a damaged entry does, and two runs at once."""

from __future__ import annotations

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.data import BlendConfig, DataConfig, SourceConfig
from kdscale.data import token_store
from kdscale.data.readers.chat import ChatTemplate
from kdscale.data.store_builder import DocumentFormat, describe_sources
from kdscale.data.store_cache import StoreCache, cache_folder


@pytest.fixture
def cache(tmp_path: Path) -> StoreCache:
    return StoreCache(tmp_path / "cache")


@pytest.fixture
def build(build: Any, cache: StoreCache):
    """`build`, with the cache of this test."""
    return lambda folder, *paths, **options: build(*paths, folder=folder, **{"cache": cache, **options})


@pytest.fixture
def surveys(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Grows by one for each text that is read to be tokenised."""
    seen: list[int] = []
    survey = token_store.survey_sources
    monkeypatch.setattr(token_store, "survey_sources", lambda *args: (seen.append(1), survey(*args))[1])
    return seen


def entries(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache").iterdir())


def contents(folder: Path, but: str = "") -> dict[str, bytes]:
    files = [item for item in folder.rglob("*") if item.is_file() and item.name != but]
    return {str(item.relative_to(folder)): item.read_bytes() for item in files}


def test_the_same_text_is_tokenised_once(build, write_jsonl, tiny_texts, tmp_path, surveys):
    path = write_jsonl("a.jsonl", tiny_texts)
    build("one", path)
    build("two", path)
    assert len(surveys) == 1
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == contents_without_cache(build, path, tmp_path)
    (tmp_path / "elsewhere").mkdir()
    moved = Path(shutil.copy(path, tmp_path / "elsewhere" / "a.jsonl"))
    assert build("three", moved).manifest["sources"][0]["path"] == str(moved)
    assert len(surveys) == 2, "only the store that was built without the cache was added"
    assert len(entries(tmp_path)) == 1


def contents_without_cache(build: Any, path: Path, tmp_path: Path) -> dict[str, bytes]:
    build("alone", path, cache=None)
    return contents(tmp_path / "alone")


def test_other_text_and_settings_are_others(build, write_jsonl, tiny_texts, tmp_path, surveys):
    path = write_jsonl("a.jsonl", tiny_texts)
    blend = BlendConfig(weights={str(path): 1.0}, tokens=500)
    for options in (
        {}, {"heldout_fraction": 0.3}, {"eos_id": 1}, {"vocab_size": 400}, {"max_document_tokens": 9},
        {"deduplicate": True}, {"blend": blend},
    ):  # fmt: skip
        build("run", path, **options)
    build("run", write_jsonl("a.jsonl", tiny_texts[:-1]))
    build("run", write_jsonl("b.jsonl", tiny_texts))
    assert len(surveys) == len(entries(tmp_path)) == 9


def test_weights_and_tags_are_no_part_of_the_files(build, write_jsonl, tiny_texts, tmp_path, surveys):
    path = write_jsonl("a.jsonl", tiny_texts)
    for weight, tag in ((1, None), (3, "web")):
        source = SourceConfig(path=str(path), weight=weight, tag=tag)
        split = build("run", path, sources=(source,)).split("train")
        assert set(split.weights_D.tolist()) == {weight}
        assert {split.tags[i] for i in split.tags_D} == {tag or "a.jsonl"}
    assert len(surveys) == 1


def test_a_blend_of_all_text_is_no_part_of_the_files_either(build, write_jsonl, tiny_texts, surveys):
    path = write_jsonl("a.jsonl", tiny_texts)
    blends = [BlendConfig(weights={str(path): weight}) for weight in (1.0, 2.0)]
    found = [build("run", path, blend=blend).split("train").blend for blend in (blends[0], None, blends[1])]
    assert [[share.share for share in blend] for blend in found] == [[1.0], [], [1.0]]
    assert len(surveys) == 1


def test_the_template_of_chats_is_part_of_the_key(build, tmp_path, surveys):
    path = tmp_path / "a.jsonl"
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "the river"}]
    path.write_text(json.dumps({"messages": messages}) + "\n")
    source, heldout = (SourceConfig(path=str(path), chat=True),), (SourceConfig(path=str(tmp_path / "h.txt")),)
    (tmp_path / "h.txt").write_text("the town")
    for name, end in (("one", ""), ("two", "<|end|>"), ("again", "")):
        template = tmp_path / name
        template.write_text("{% for message in messages %}{{ message.content }}" + end + "{% endfor %}")
        build("run", path, sources=source, heldout_sources=heldout, chat_template=str(template))
    assert len(surveys) == 2


def test_a_damaged_entry_is_made_again(build, write_jsonl, tiny_texts, tmp_path, surveys):
    path = write_jsonl("a.jsonl", tiny_texts)
    build("one", path)
    expected = contents(tmp_path / "one")
    (entry,) = entries(tmp_path)
    tokens = entry / "train" / "tokens.bin"
    raw = tokens.read_bytes()
    tokens.unlink()  # a new file: the link into the run's own folder stays as it is
    tokens.write_bytes(bytes([raw[0] ^ 1]) + raw[1:])
    build("two", path)
    assert len(surveys) == 2
    assert contents(tmp_path / "one") == contents(tmp_path / "two") == expected
    build("three", path)
    assert len(surveys) == 2


def test_an_unusable_cache_does_not_stop_a_run(build, write_jsonl, tiny_texts, tmp_path, reporter, monkeypatch):
    (tmp_path / "cache").write_text("a file where the folder should be")
    said: list[str] = []
    monkeypatch.setattr(reporter, "say", said.append)
    assert build("one", write_jsonl("a.jsonl", tiny_texts)).split("train").documents
    assert any("not shared with other runs" in line for line in said)


def test_runs_at_once_leave_one_whole_entry(build, write_jsonl, tiny_texts, tmp_path, cache, reporter):
    store = build("one", write_jsonl("a.jsonl", tiny_texts), cache=None)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: cache.put("key", store.folder, reporter), range(40)))
    assert contents(tmp_path / "cache" / "key", but="digests.json") == contents(tmp_path / "one")
    assert [item.name for item in entries(tmp_path)] == ["key"]


def test_a_slower_run_keeps_the_entry_of_the_faster(build, write_jsonl, tiny_texts, tmp_path, cache, reporter):
    """Another run puts the same entry between the look and the rename."""
    store = build("one", write_jsonl("a.jsonl", tiny_texts), cache=None)
    faster = StoreCache(tmp_path / "cache")
    original = Path.rename

    def rename(path: Path, target: Path) -> Path:
        if not target.exists():
            target.mkdir()
            (target / "digests.json").write_text("{}")
        return original(path, target)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Path, "rename", rename)
        faster.put("key", store.folder, reporter)
    assert (tmp_path / "cache" / "key" / "digests.json").read_text() == "{}"
    assert [item.name for item in (tmp_path / "cache").iterdir()] == ["key"]


def test_hub_text_is_not_shared(cache, tokenizer):
    description = {"sources": [{"path": "hf:x", "split": "train"}], "heldout_fraction": 0.1}
    assert cache.key(description, DocumentFormat(0, 10), "t") is None
    local = describe_sources(DataConfig(), ChatTemplate(tokenizer))
    assert cache.key(local, DocumentFormat(0, 10), "t") != cache.key(local, DocumentFormat(1, 10), "t")


def test_where_the_cache_is(monkeypatch, tmp_path):
    monkeypatch.setenv("KDSCALE_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path / "tokens"
    monkeypatch.delenv("KDSCALE_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "kdscale" / "tokens"
