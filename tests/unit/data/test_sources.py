"""Text sources: what is read, in which order, and what is refused with which words."""

from __future__ import annotations

import gzip
import hashlib
import json
import sys
import types
from pathlib import Path
from pkgutil import resolve_name

import pytest

from kdscale.config.data import READERS, SourceConfig
from kdscale.data.sources import builtin_names, cut_text_files, describe_source, read_documents, source_files
from kdscale.errors import ConfigError, DataError, ServiceError
from kdscale.weights.locate import hub_connection_errors


def texts(path: Path | str, field: str = "text") -> list[str]:
    return [document.text for document in read_documents(SourceConfig(path=str(path), field=field))]


def test_builtin_is_public_domain_and_unchanged():
    documents = list(read_documents(SourceConfig(path="builtin:classics")))
    assert builtin_names() == ["classics"]
    assert len(documents) == 990
    assert {document.source for document in documents} == {"austen", "kjv", "jargon", "devil"}
    assert [document.index for document in documents] == list(range(990))
    (path,) = source_files(SourceConfig(path="builtin:classics"))
    raw = path.read_bytes()
    assert raw[4:8] == b"\0\0\0\0", "gzip mtime must be zero, for reproducible bytes"
    licences = {json.loads(line)["license"] for line in gzip.decompress(raw).splitlines()}
    assert licences == {"public domain"}
    assert hashlib.sha256(raw).hexdigest() in (path.parent / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name", READERS)
def test_every_reader_has_its_function_and_names_of_its_own(name: str):
    row = READERS[name]
    assert callable(resolve_name(row.read))
    assert bool(row.suffixes) != bool(row.scheme)
    others = [reader for reader in READERS.values() if reader is not row]
    assert not any(other.claims(f"a{suffix}") for suffix in row.suffixes for other in others)


def test_unknown_builtin():
    with pytest.raises(DataError, match=r"builtin:nope.*\n.*classics"):
        texts("builtin:nope")


def test_txt_is_one_document_and_bom_is_dropped(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\n\ntwo\n")
    (document,) = read_documents(SourceConfig(path=str(tmp_path / "a.txt")))
    assert (document.text, document.source, document.index) == ("one\n\ntwo\n", "a.txt", 0)


def test_long_txt_is_cut_at_blank_lines(tmp_path: Path):
    paragraph = "naïve words " * 400 + "\n"
    written = (paragraph + "  \n") * 100 + "x" * 300_000 + "\r\n" + "end\n"
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf" + written.encode())
    documents = texts(path)
    assert "".join(documents) == written
    assert all(65_536 <= len(text) <= 2 * 65_536 for text in documents[:-1])
    assert sum(text.endswith("\n  \n") for text in documents) == 7, "the prose; what follows has no blank line"
    (notice,) = cut_text_files([SourceConfig(path=str(path))])
    assert "1 .txt file(s)" in notice
    assert not cut_text_files([SourceConfig(path="builtin:classics")])


def test_bad_bytes_of_a_long_txt_are_found_at_their_line(tmp_path: Path):
    (tmp_path / "a.txt").write_bytes(b"words\n" * 500_000 + b"\xff\n")
    with pytest.raises(DataError, match=r"line 500001 is not UTF-8(.|\n)*iconv -f latin1"):
        texts(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_text("words", encoding="utf-16")
    with pytest.raises(DataError, match="iconv -f utf-16"):
        texts(tmp_path / "a.txt")


def test_the_field_that_names_the_source_can_be_chosen_or_left_out(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"text": "one", "source": "https://a/1", "site": "a"}\n')
    named = {
        field: [d.source for d in read_documents(SourceConfig(path=str(path), source_field=field))]
        for field in ("source", "site", None)
    }
    assert named == {"source": ["https://a/1"], "site": ["a"], None: ["x.jsonl"]}


def test_chat_records_say_what_to_do(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    with pytest.raises(DataError, match="chat: true"):
        texts(path)


def test_folder_and_glob_are_sorted_and_skip_hidden(tmp_path: Path, write_jsonl):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "c.txt").write_text("three")
    (tmp_path / ".partial-1-x.txt").write_text("hidden")
    (tmp_path / "notes.pdf").write_text("not text")
    write_jsonl("b.jsonl.gz", ["two"])
    write_jsonl("a.jsonl", ["one"])
    assert texts(tmp_path) == ["one", "two", "three"]
    assert texts(tmp_path / "*.jsonl*") == ["one", "two"]
    assert texts(f"{tmp_path}/**/*.txt") == ["three"]


def test_jsonl_field_label_blank_lines(tmp_path: Path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"body": "one", "source": "s1"}\n\n{"body": "two", "source": 3}\n')
    documents = list(read_documents(SourceConfig(path=str(path), field="body")))
    assert [(d.text, d.source) for d in documents] == [("one", "s1"), ("two", "x.jsonl")]


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("a.jsonl", b'{"text": "ok"}\n{"text": \n', ["a.jsonl line 2", "not valid JSON"]),
        ("a.jsonl", b'{"text": "ok"}\n{"txt": "x"}\n', ["a.jsonl line 2", "no field 'text'", "['txt']"]),
        ("a.jsonl", b'{"text": 5}\n', ["a.jsonl line 1", "a string", "int"]),
        ("a.jsonl", b'{"text": null}\n', ["a.jsonl line 1", "a string", "NoneType"]),
        ("a.jsonl", b"[1]\n", ["a.jsonl line 1", "a JSON object", "list"]),
        ("a.jsonl", b'{"text": "\\ud800"}\n', ["a.jsonl line 1", "not valid Unicode"]),
        ("a.jsonl", b'{"text": "ok"}\n{"text": "caf\xe9"}\n', ["a.jsonl line 2", "not UTF-8", "0xe9"]),
        ("a.txt", b"one\ntwo\ncaf\xe9 au lait\n", ["a.txt line 3", "not UTF-8", "0xe9"]),
        ("a.txt", b"", ["a.txt", "no document"]),
        ("a.txt", b" \n ", ["a.txt", "no document"]),
        ("a.jsonl", b"\n\n", ["a.jsonl", "no document"]),
        ("a.pdf", b"%PDF", ["a.pdf", "unknown kind", ".parquet"]),
        ("a.jsonl.gz", b"not gzip", ["a.jsonl.gz", "damaged gzip"]),
        (
            "a.jsonl.gz",
            gzip.compress(b'{"text": "some words"}\n' * 999)[:-12],
            ["a.jsonl.gz", "damaged gzip", "after line"],
        ),
    ],
)
def test_bad_files(tmp_path: Path, name: str, raw: bytes, words: list[str]):
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError) as caught:
        texts(tmp_path / name)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_flipped_bits_in_gzip(tmp_path: Path):
    raw = bytearray(gzip.compress(b'{"text": "some words"}\n' * 50))
    raw[-6] ^= 0xFF  # the checksum
    (tmp_path / "a.jsonl.gz").write_bytes(raw)
    with pytest.raises(DataError, match="damaged gzip"):
        texts(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("path", ["nowhere.txt", "nowhere", "org/name"])
def test_missing_never_asks_a_hub(path: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(DataError, match="does not exist") as caught:
        texts(path)
    assert ("did you mean hf:org/name?" in str(caught.value)) == (path == "org/name")


def test_empty_folder(tmp_path: Path):
    with pytest.raises(DataError, match="holds no text"):
        texts(tmp_path)


def test_hub_source(monkeypatch: pytest.MonkeyPatch):
    calls = []

    def load_dataset(name: str, config: str | None, *, split: str, streaming: bool) -> list[dict[str, str]]:
        calls.append((name, config, split, streaming))
        if name == "org/absent":
            raise FileNotFoundError("no such data set")
        if name == "org/unreachable":
            raise ConnectionError("the connection broke off")
        if name == "org/client":
            raise hub_connection_errors()[-1]("the HTTP client's own error")
        return [{"body": "one"}, {"body": "two"}]

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load_dataset))
    source = SourceConfig(path="hf:org/set#small", field="body", split="validation")
    assert [d.text for d in read_documents(source)] == ["one", "two"]
    assert calls == [("org/set", "small", "validation", True)]
    with pytest.raises(DataError, match=r"record 0 has no field 'text'"):
        texts("hf:org/set")
    with pytest.raises(DataError, match="no such data set"):
        texts("hf:org/absent")
    for name in ("unreachable", "client"):
        with pytest.raises(ServiceError, match=r"cannot be fetched"):
            texts(f"hf:org/{name}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(ConfigError, match=r"kdscale\[datasets\]"):
        texts("hf:org/set")


def test_describe_changes_with_content(write_jsonl):
    source = SourceConfig(path=str(write_jsonl("a.jsonl", ["one"])))
    before = describe_source(source)
    assert before["files"][0]["sha256"] == hashlib.sha256(b'{"text": "one"}\n').hexdigest()
    write_jsonl("a.jsonl", ["eno"])
    assert describe_source(source) != before
