"""Parquet, Arrow and folders of `save_to_disk`: the wanted columns in order, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from pyarrow import parquet

from kdscale.config.data import SourceConfig
from kdscale.data.sources import describe_source, read_documents, source_files
from kdscale.errors import CheckpointError, DataError

RECORDS = {
    "text": [f"text {n}" for n in range(700)],
    "source": [f"s{n % 2}" if n % 3 else None for n in range(700)],
    "other": [{"a": n} for n in range(700)],
}


def write_parquet(path: Path, columns: dict) -> SourceConfig:
    parquet.write_table(pa.table(columns), path, row_group_size=300)
    return SourceConfig(path=str(path))


def save_to_disk(folder: Path, rows: int = 700) -> None:
    datasets.Dataset.from_dict({key: values[:rows] for key, values in RECORDS.items()}).save_to_disk(
        folder, num_shards=3
    )


def test_parquet_rows_are_documents_in_order(tmp_path: Path):
    documents = list(read_documents(write_parquet(tmp_path / "a.parquet", RECORDS)))
    assert [document.text for document in documents] == RECORDS["text"]
    assert [document.source for document in documents[:4]] == ["a.parquet", "s1", "s0", "a.parquet"]


def test_a_saved_dataset_is_read_without_its_library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    save_to_disk(tmp_path / "plain")
    datasets.DatasetDict(
        train=datasets.Dataset.from_dict({"text": ["one"]}), test=datasets.Dataset.from_dict({"text": ["two"]})
    ).save_to_disk(tmp_path / "parts")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    plain = SourceConfig(path=str(tmp_path / "plain"))
    assert [d.text for d in read_documents(plain)] == RECORDS["text"]
    assert len(source_files(plain)) == len(describe_source(plain)["files"]) == 3
    parts = {split: SourceConfig(path=str(tmp_path / "parts"), split=split) for split in ("train", "test")}
    assert [[d.text for d in read_documents(source)] for source in parts.values()] == [["one"], ["two"]]
    with pytest.raises(DataError, match=r"no split 'dev'(.|\n)*train"):
        source_files(SourceConfig(path=str(tmp_path / "parts"), split="dev"))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"_data_files": [{"filename": "../secret.arrow"}]}, CheckpointError, "outside itself"),
        ({"_data_files": [{"filename": "absent.arrow"}]}, DataError, "no absent.arrow"),
        ({"_data_files": "x"}, DataError, "is damaged"),
        ({"_indices_data_files": [{"filename": "indices.arrow"}]}, DataError, "flatten_indices"),
    ],
)
def test_a_saved_dataset_stays_in_its_folder(tmp_path: Path, change: dict, error: type, words: str):
    save_to_disk(tmp_path / "set", rows=3)
    state = tmp_path / "set" / "state.json"
    state.write_text(json.dumps({**json.loads(state.read_text()), **change}))
    (tmp_path / "secret.arrow").write_bytes((tmp_path / "set" / "data-00000-of-00003.arrow").read_bytes())
    with pytest.raises(error, match=words):
        source_files(SourceConfig(path=str(tmp_path / "set")))


def test_a_missing_column_and_a_chat_say_what_to_do(tmp_path: Path):
    with pytest.raises(DataError, match=r"no column 'text'(.|\n)*\['body'\](.|\n)*`field`"):
        list(read_documents(write_parquet(tmp_path / "a.parquet", {"body": ["x"]})))
    with pytest.raises(DataError, match="chat: true"):
        list(read_documents(write_parquet(tmp_path / "b.parquet", {"messages": [[{"role": "user"}]]})))
    with pytest.raises(DataError, match=r"row 2, field 'text'(.|\n)*NoneType"):
        list(read_documents(write_parquet(tmp_path / "c.parquet", {"text": ["x", None]})))
    with pytest.raises(DataError, match="holds no document"):
        list(read_documents(write_parquet(tmp_path / "d.parquet", {"text": pa.array([], pa.string())})))


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow"])
def test_damaged_files(tmp_path: Path, name: str):
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, RECORDS)
    else:
        with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, (table := pa.table(RECORDS)).schema) as out:
            out.write_table(table, max_chunksize=100)
    raw = path.read_bytes()
    assert len(list(read_documents(SourceConfig(path=str(path))))) == 700
    for damaged in (b"", b"PAR1", raw[: len(raw) // 2], b"x" * len(raw)):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match=r"is damaged"):
            list(read_documents(SourceConfig(path=str(path))))
