"""The token store: contents, split, counts, refusals, determinism, and being killed."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from kdscale.config.data import BlendConfig, SourceConfig
from kdscale.data import deduplicate, store_builder
from kdscale.data import token_store as store_module
from kdscale.data.readers import megatron
from kdscale.data.sources import Document
from kdscale.data.store_builder import DocumentFormat
from kdscale.data.token_store import TokenStore
from kdscale.errors import ConfigError, DataError
from kdscale.files import remove_leftovers
from kdscale.models.loading import SpecialTokens
from kdscale.models.tokenizer import tokenizing
from kdscale.models.tokenizer.tokenizing import EncodedText


def documents(store: TokenStore, tokenizer: Any, split: str) -> list[str]:
    part = store.split(split)
    assert all(part.document_tokens(i)[-1] == 0 for i in range(part.documents))
    return [tokenizer.decode(part.document_tokens(i)[:-1]) for i in range(part.documents)]


def test_every_document_is_in_one_split(build, write_jsonl, tiny_texts, tokenizer):
    store = build(write_jsonl("a.jsonl", tiny_texts))
    train, held = (documents(store, tokenizer, name) for name in ("train", "heldout"))
    threshold = 0.2 * 2**64
    expected = [t for t in tiny_texts if int.from_bytes(hashlib.sha256(t.encode()).digest()[:8], "big") < threshold]
    assert held == expected
    assert train == [text for text in tiny_texts if text not in expected]
    for name, texts in (("train", train), ("heldout", held)):
        split = store.split(name)
        assert split.tokens_T.dtype == np.uint16
        assert split.bytes_D.tolist() == [len(text.encode()) for text in texts]
        assert split.bytes == store.manifest["splits"][name]["bytes"]
        assert split.tokens == split.lengths.sum() == store.manifest["splits"][name]["tokens"]
    heldout = store.split("heldout")
    assert [int(heldout.document_token_bytes(i).sum()) for i in range(heldout.documents)] == heldout.bytes_D.tolist()
    with pytest.raises(DataError):
        store.split("train").document_token_bytes(0)
    with pytest.raises(ConfigError):
        store.split("test")


def test_heldout_choice_is_stable_when_sources_are_added(build, write_jsonl, tiny_texts, tokenizer):
    one = write_jsonl("a.jsonl", tiny_texts[:30])
    two = write_jsonl("b.jsonl", tiny_texts[30:])
    alone = documents(build(one, folder="one"), tokenizer, "heldout")
    both = documents(build(two, one, folder="two"), tokenizer, "heldout")
    assert [text for text in both if text in tiny_texts[:30]] == alone


def test_equal_texts_never_fall_on_both_sides(build, write_jsonl, tiny_texts, tokenizer):
    store = build(write_jsonl("a.jsonl", tiny_texts + tiny_texts))
    train, held = (set(documents(store, tokenizer, name)) for name in ("train", "heldout"))
    assert not train & held
    assert train | held == set(tiny_texts)


def test_heldout_sources_replace_the_fraction(build, write_jsonl, tiny_texts, tokenizer):
    store = build(write_jsonl("a.jsonl", tiny_texts[:40]), heldout=(write_jsonl("h.jsonl", tiny_texts[30:45]),))
    assert documents(store, tokenizer, "train") == tiny_texts[:30]
    assert documents(store, tokenizer, "heldout") == tiny_texts[30:45]
    assert store.manifest["dropped"]["train_text_is_held_out"] == 10


def test_same_inputs_same_bytes(build, write_jsonl, tiny_texts, tmp_path, monkeypatch):
    path = write_jsonl("a.jsonl", tiny_texts)
    build(path, folder="one")
    monkeypatch.setattr(store_builder, "_BATCH_DOCUMENTS", 7)  # how documents are batched must not matter
    build(path, folder="two")
    for file in sorted(item for item in (tmp_path / "one").rglob("*") if item.is_file()):
        other = tmp_path / "two" / file.relative_to(tmp_path / "one")
        assert file.read_bytes() == other.read_bytes(), file.name


def test_short_documents_are_counted(build, write_jsonl, tiny_texts):
    store = build(write_jsonl("a.jsonl", [*tiny_texts, "", ""]))
    assert store.manifest["dropped"]["short"] == 2
    assert sum(store.manifest["splits"][name]["documents"] for name in ("train", "heldout")) == len(tiny_texts)


def test_weights_and_labels(build, write_jsonl, tiny_texts):
    paths = [write_jsonl("a.jsonl", tiny_texts[:30], source="A"), write_jsonl("b.jsonl", tiny_texts[30:])]
    sources = [SourceConfig(path=str(path), weight=weight) for path, weight in zip(paths, (1, 3), strict=True)]
    store = build(sources=sources)
    train, held = store.split("train"), store.split("heldout")
    names = [train.source_labels[label] for label in train.labels_D]
    assert set(names) == {"A", "b.jsonl"}
    assert train.weights_D.tolist() == [{"A": 1, "b.jsonl": 3}[name] for name in names]
    assert set(held.weights_D.tolist()) == {1}


def test_tags_are_what_sources_say_else_labels(build, write_jsonl, tiny_texts):
    paths = [
        write_jsonl("a.jsonl", tiny_texts[:20], source="A"),
        write_jsonl("b.jsonl", tiny_texts[20:40]),
        write_jsonl("c.jsonl", tiny_texts[40:], source="C"),
    ]
    sources = [SourceConfig(path=str(p), tag=tag) for p, tag in zip(paths, (None, "code", "A"), strict=True)]
    store = build(sources=sources)
    assert set(store.tags) == {"A", "b.jsonl", "C", "code"}
    for name in ("train", "heldout"):
        split = store.split(name)
        wanted = [("A", "code", "A")[source] for source in split.sources_D]
        assert [split.tags[tag] for tag in split.tags_D] == wanted
    numbers = store.folder / "train" / "sources.bin"
    numbers.write_bytes(b"\xff" * numbers.stat().st_size)
    with pytest.raises(DataError, match=r"sources\.bin is damaged"):
        store.split("train")


def test_a_blend_reads_of_each_source_its_share_of_the_budget(build, write_jsonl, tiny_texts, tmp_path):
    """Whatever the number of processes, and exactly to the document that fills the share."""
    names = [write_jsonl(f"{name}.jsonl", [f"{name} {text}" for text in tiny_texts]) for name in "abc"]
    sources = tuple(SourceConfig(path=str(path), tag=path.name[0] if path.name[0] != "c" else "a") for path in names)
    whole = build(sources=sources, folder="whole").split("train")
    blend = BlendConfig(weights={"a": 3.0, "b": 1.0}, tokens=whole.tokens // 3)
    stores = [build(sources=sources, folder=str(n), blend=blend, processes=n) for n in (1, 2)]
    splits = [store.split("train") for store in stores]
    assert splits[0].tokens_T.tolist() == splits[1].tokens_T.tolist()
    assert stores[0].split("heldout").tokens_T.tolist() == stores[1].split("heldout").tokens_T.tolist()
    assert splits[0].blend == (("a", 0.75, (0, 2)), ("b", 0.25, (1,)))
    for share, sources_of in ((0.75, (0, 2)), (0.25, (1,))):
        own = np.isin(splits[0].sources_D, sources_of)
        lengths = splits[0].lengths[own]
        assert lengths.sum() >= share * blend.tokens > lengths[:-1].sum()


def test_deduplication_leaves_out_what_came_before(build, write_jsonl, tiny_texts, tokenizer, monkeypatch):
    monkeypatch.setattr(deduplicate, "_LEAST_MERGED", 7)
    again = [f"  {text.upper()}\n" for text in tiny_texts[:9]]
    composed = ["cafe\u0301 by the river", "caf\u00e9  by the river", "cafe by the river"]
    path = write_jsonl("a.jsonl", [*tiny_texts, *again, *tiny_texts[5:8], *composed])
    store = build(path, deduplicate=True)
    assert store.manifest["dropped"]["duplicate"] == 9 + 3 + 1
    kept = documents(store, tokenizer, "train") + documents(store, tokenizer, "heldout")
    assert sorted(kept) == sorted([*tiny_texts, composed[0], composed[2]])
    assert build(path, folder="all").manifest["dropped"]["duplicate"] == 0


PASSAGE = (
    "the boats came slowly down the river while the market was closing, and nobody in the old town saw them at all"
)


def test_leaks_are_reported_dropped_or_end_the_run(build, write_jsonl, tiny_texts, tmp_path, tokenizer, monkeypatch):
    """The passage is in two training documents, and in the held-out text or in a source of its own."""
    train = write_jsonl("a.jsonl", [*tiny_texts[:20], f"One. {PASSAGE}.", *tiny_texts[20:], f"{PASSAGE} Two"])
    clean, heldout = write_jsonl("h.jsonl", ["quite other words"]), write_jsonl("p.jsonl", [f"So: {PASSAGE}!"])
    sizes = {}
    for name, options in {
        "off": {"heldout": (heldout,)},
        "none": {"heldout": (clean,), "leaks": "fail"},
        "report": {"heldout": (heldout,), "leaks": "report"},
        "drop": {"heldout": (heldout,), "leaks": "drop"},
        "task": {"heldout": (clean,), "leaks": "drop", "leak_sources": (SourceConfig(path=str(heldout)),)},
    }.items():
        store = build(train, folder=name, **options)
        sizes[name] = store.split("train").documents
        assert store.split("train").tokens == store.split("train").lengths.sum()
        if name in ("report", "drop", "task"):
            assert store.manifest["leaks"]["documents"] == 2
            assert "boats came slowly" in store.manifest["leaks"]["examples"][0]
    total = len(tiny_texts) + 2
    assert sizes == {"off": total, "none": total, "report": total, "drop": total - 2, "task": total - 2}
    kept, whole = documents(store, tokenizer, "train"), documents(TokenStore.open(tmp_path / "off"), tokenizer, "train")
    assert kept == [text for text in whole if PASSAGE not in text]
    with pytest.raises(DataError, match=r"evaluation text in it(.|\n)*boats came slowly(.|\n)*data.leaks: drop"):
        build(train, folder="fail", heldout=(heldout,), leaks="fail")
    assert not (tmp_path / "fail").exists()
    with pytest.raises(DataError, match="evaluation text in it"):
        build(write_jsonl("b.jsonl", [PASSAGE]), heldout=(heldout,), leaks="drop")


def test_what_is_dropped_takes_its_labels_with_it(build, write_jsonl, tiny_texts, monkeypatch):
    read = store_builder.read_documents

    def with_answers(source: SourceConfig, chat: Any):
        for document in read(source, chat):
            yield replace(document, answers=((0, document.index % 5 + 1),))

    monkeypatch.setattr(store_builder, "read_documents", with_answers)
    heldout = write_jsonl("h.jsonl", [PASSAGE])
    path = write_jsonl("a.jsonl", [*tiny_texts[:9], f"{PASSAGE} x", *tiny_texts[9:]])
    whole, kept = (
        build(path, folder=leaks, heldout=(heldout,), leaks=leaks).split("train") for leaks in ("report", "drop")
    )
    others = [i for i in range(whole.documents) if i != 9]
    assert [kept.document_is_label(i).tolist() for i in range(kept.documents)] == [
        whole.document_is_label(i).tolist() for i in others
    ]


def test_megatron_documents_are_taken_as_they_are(build, write_jsonl, tiny_texts, tmp_path):
    """What the store has, written for Megatron and read again, is the same store but for the split."""
    plain = build(write_jsonl("a.jsonl", tiny_texts), folder="plain").split("heldout")
    megatron.write(tmp_path / "set", plain.tokens_T, plain.lengths, 320)
    store = build(write_jsonl("b.jsonl", tiny_texts[:5]), heldout=(tmp_path / "set.idx",), folder="again").split(
        "heldout"
    )
    assert store.tokens_T.tolist() == plain.tokens_T.tolist()
    assert store.token_bytes_T.tolist() == plain.token_bytes_T.tolist()
    assert store.bytes_D.tolist() == plain.bytes_D.tolist()


def test_the_spans_of_answers_become_labels(build, write_jsonl, tiny_texts, tokenizer, monkeypatch):
    """Every third document says what of it is an answer: all tokens with a byte of it are labels, no others."""
    path = write_jsonl("a.jsonl", tiny_texts)
    plain = build(path, folder="plain")
    assert not (plain.folder / "train" / "loss.bin").exists()
    read = store_builder.read_documents

    def with_answers(source: SourceConfig, chat: Any):
        for document in read(source, chat):
            size = len(document.text)
            spans = ((size // 4, size // 3), (size // 2, size - document.index % 2))
            yield replace(document, answers=None if document.index % 3 else spans)

    monkeypatch.setattr(store_builder, "read_documents", with_answers)
    store = build(path, folder="answers")
    number = {text: index for index, text in enumerate(tiny_texts)}
    for name in ("train", "heldout"):
        split, whole = store.split(name), plain.split(name)
        assert np.array_equal(split.tokens_T, whole.tokens_T)
        for i in range(split.documents):
            ids = split.document_tokens(i)
            text = tokenizer.decode(ids[:-1])
            index, size = number[text], len(text)
            spans = [(size // 4, size // 3), (size // 2, size - index % 2)]
            offsets = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False)["offset_mapping"]
            inside = [any(start < b and end > a for a, b in spans) for start, end in offsets]
            expected = [True] * ids.size if index % 3 else [*inside, index % 2 == 0]
            assert split.document_is_label(i).tolist() == expected


def test_a_chat_template_may_bring_its_own_begin_and_end():
    text = EncodedText(np.asarray([5, 40, 41, 0]), np.asarray([3, 1, 1, 4]))
    form = DocumentFormat(eos_id=0, vocab_size=99, special=SpecialTokens(prefix=(5,)), markup_ids=(41,))
    chat = Document("<s>ab</s>", "x", 0, answers=((4, 9),))
    wanted = [[40, 41, 0], [1, 0, 0], [0, 1, 1]]  # a special token is learned, and counts no bytes
    assert store_builder.document_tokens(chat, text, form).tolist() == wanted
    learned_by_all = store_builder.document_tokens(replace(chat, answers=None), text, form)
    assert learned_by_all[0].tolist() == [5, 40, 41, 0, 0], "a plain text stays as it is"


def test_long_documents_are_cut_evenly(build, write_jsonl, tiny_texts):
    path = write_jsonl("a.jsonl", tiny_texts)
    whole, cut = (
        build(path, folder="w").split("heldout"),
        build(path, folder="c", max_document_tokens=9).split("heldout"),
    )
    assert cut.lengths.max() <= 9
    assert cut.lengths.min() >= 4
    assert np.array_equal(cut.tokens_T, whole.tokens_T)
    assert cut.bytes == whole.bytes
    with pytest.raises(ConfigError, match="max_document_tokens"):
        build(path, max_document_tokens=3)


def test_wide_vocabulary_needs_32_bits(build, write_jsonl, tiny_texts):
    assert build(write_jsonl("a.jsonl", tiny_texts), vocab_size=70_000).split("train").tokens_T.dtype == np.uint32


def test_sources_beyond_what_a_label_can_number_are_other(tmp_path, build, tiny_texts, monkeypatch):
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": t, "source": f"url{i}"}) + "\n" for i, t in enumerate(tiny_texts)))
    monkeypatch.setattr(store_builder, "_MAX_LABELS", 4)
    store = build(path)
    assert store.manifest["source_labels"] == ["url0", "url1", "url2", "other"]
    labels = np.concatenate([store.split(name).labels_D for name in ("train", "heldout")])
    assert np.bincount(labels).tolist() == [1, 1, 1, len(tiny_texts) - 3]


def test_what_the_tokenizer_puts_around_a_text(build, write_jsonl, tiny_texts):
    path = write_jsonl("a.jsonl", [*tiny_texts, ""])
    plain = build(path, folder="plain").split("heldout")
    store = build(path, folder="framed", special=SpecialTokens(prefix=(5,), suffix=(6, 7)))
    framed = store.split("heldout")
    assert framed.prefix_ids == (5,)
    assert store.manifest["dropped"]["short"] == 1
    for i in range(plain.documents):
        assert framed.document_tokens(i).tolist() == [*plain.document_tokens(i)[:-1], 6, 7]
        assert framed.document_token_bytes(i).tolist() == [*plain.document_token_bytes(i)[:-1], 0, 0]


@pytest.mark.parametrize("options", [{"vocab_size": 100}, {"eos_id": 320}, {"eos_id": -1}])
def test_ids_beyond_the_model_are_refused(build, write_jsonl, tiny_texts, tmp_path, options):
    with pytest.raises(DataError, match="does not belong to the model"):
        build(write_jsonl("a.jsonl", tiny_texts), **options)
    assert not (tmp_path / "store").exists()


def test_empty_splits_are_refused(build, write_jsonl, tiny_texts, tmp_path):
    path = write_jsonl("a.jsonl", tiny_texts)
    with pytest.raises(DataError, match="left for the heldout split"):
        build(path, heldout_fraction=1e-9)
    with pytest.raises(DataError, match="left for the train split"):
        build(path, heldout=(path,))
    with pytest.raises(DataError, match="left for the train split"):
        build(write_jsonl("b.jsonl", [""]))
    assert not (tmp_path / "store").exists()


def test_bad_last_line_is_found_before_tokenizing(build, write_jsonl, tiny_texts, monkeypatch):
    path = write_jsonl("a.jsonl", tiny_texts)
    with path.open("a") as stream:
        stream.write("{oops\n")
    monkeypatch.setattr(tokenizing.BatchEncoder, "encode", lambda *_: pytest.fail("tokenized before checking"))
    with pytest.raises(DataError, match=f"line {len(tiny_texts) + 1} is not valid JSON"):
        build(path)


def test_killed_build_is_not_a_store(build, write_jsonl, tiny_texts, tmp_path, monkeypatch):
    path = write_jsonl("a.jsonl", tiny_texts)
    leftover = tmp_path / ".partial-1-store"
    (leftover / "train").mkdir(parents=True)
    (leftover / "train" / "tokens.bin").write_bytes(b"\0" * 10)
    with pytest.raises(DataError, match="no finished token store"):
        TokenStore.open(tmp_path / "store")
    with pytest.raises(DataError, match="no finished token store"):
        TokenStore.open(leftover)
    monkeypatch.setattr(store_module, "write_json", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        build(path)
    assert not (tmp_path / "store").exists()
    monkeypatch.undo()
    assert build(path).split("train").documents > 0
    assert remove_leftovers(tmp_path) == [leftover]


def test_damaged_store_is_refused(build, write_jsonl, tiny_texts, tmp_path):
    build(write_jsonl("a.jsonl", tiny_texts))
    tokens = tmp_path / "store" / "train" / "tokens.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"tokens.bin is damaged"):
        TokenStore.open(tmp_path / "store")
    manifest = tmp_path / "store" / "manifest.json"
    manifest.write_text(json.dumps({"version": 99}))
    with pytest.raises(DataError, match="of this version"):
        TokenStore.open(tmp_path / "store")


def test_manifest_names_inputs(build, write_jsonl, tiny_texts, tokenizer):
    manifest = build(write_jsonl("a.jsonl", tiny_texts)).manifest
    assert manifest["tokenizer_sha256"] == hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest()
    assert len(manifest["sources"][0]["files"][0]["sha256"]) == 64
