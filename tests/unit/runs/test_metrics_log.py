"""metrics.jsonl: a torn last line is a kill; any other damaged line is kept and reported."""

from __future__ import annotations

import json
from pathlib import Path

from kdscale.runs.metrics_log import MetricsLog, read_metrics


def write_rows(path: Path, count: int) -> list[bytes]:
    log = MetricsLog(path)
    for step in range(1, count + 1):
        log.write("train", step, loss=1.0 / step)
    log.close()
    return path.read_bytes().splitlines(keepends=True)


def steps(path: Path) -> list[int]:
    return [row["step"] for row in read_metrics(path)]


def test_a_resumed_run_cuts_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "metrics.jsonl"
    write_rows(path, 5)
    MetricsLog(path, resume_step=3).close()
    assert steps(path) == [1, 2, 3]


def test_a_run_killed_before_its_first_checkpoint_has_step_0_once(tmp_path: Path) -> None:
    for _ in range(2):
        log = MetricsLog(tmp_path / "m.jsonl", 0)
        log.write("validation", 0, loss=2.0)
        log.close()
    assert [row["step"] for row in read_metrics(tmp_path / "m.jsonl")] == [0]


def test_a_last_line_cut_short_by_a_kill_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = write_rows(path, 3)
    path.write_bytes(b"".join(lines[:2]) + lines[2][:10])
    assert steps(path) == [1, 2]
    said: list[str] = []
    MetricsLog(path, resume_step=9, say=said.append).close()
    assert path.read_bytes() == b"".join(lines[:2])
    assert said == []
    path.write_bytes(b"".join(lines).rstrip(b"\n"))  # whole but for the newline
    assert steps(path) == [1, 2, 3]


def test_a_damaged_line_loses_no_other_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = write_rows(path, 10)
    for damage in (
        b"{ nonsense\n",
        b"\xff\xfe\x00\n",
        b"[1, 2]\n",
        b'{"kind": "train"}\n',
        b'{"step": "x", "kind": 1}\n',
    ):
        path.write_bytes(b"".join([*lines[:4], damage, *lines[5:]]))
        assert steps(path) == [1, 2, 3, 4, 6, 7, 8, 9, 10]
        said: list[str] = []
        log = MetricsLog(path, resume_step=9, say=said.append)
        log.write("train", 10, loss=0.5)
        log.close()
        assert path.read_bytes().splitlines(keepends=True)[:9] == [*lines[:4], damage, *lines[5:9]]
        assert json.loads(path.read_bytes().splitlines()[-1])["loss"] == 0.5
        assert len(said) == 1 and "line 5 is damaged" in said[0]


def test_rows_are_on_the_disk_when_a_checkpoint_is_sealed(tmp_path: Path, monkeypatch) -> None:
    synced: list[int] = []
    monkeypatch.setattr("os.fsync", synced.append)
    log = MetricsLog(tmp_path / "metrics.jsonl")
    before = len(synced)
    log.write("train", 1, loss=1.0)
    assert len(synced) == before
    log.sync()
    assert len(synced) == before + 1
    monkeypatch.setattr("kdscale.runs.metrics_log._SYNC_SECONDS", 0.0)
    log.write("train", 2, loss=1.0)
    assert len(synced) == before + 2
    log.close()


def test_rows_of_the_wrong_kind_and_files_that_are_none(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"kind": "train", "step": 1, "loss": 2.0}\n'
    bad = [b"[]", b"null", b"9" * 5000, b"[" * 5000, b'{"kind": "train", "step": true}', b'{"kind": 1, "step": 1}',
           b'{"kind": "train", "step": 2, "loss": "x"}', b'{"kind": "train", "step": 2, "loss": NaN}',
           b'{"kind": "train", "step": 2, "loss": []}', b'{"kind": "train", "step": -1}', b"\xff"]  # fmt: skip
    path.write_bytes(b"\n".join(bad) + b"\n" + good)
    assert [row["loss"] for row in read_metrics(path)] == [2.0]
    path.unlink()
    path.mkdir()
    assert list(read_metrics(path)) == []
    said: list[str] = []
    MetricsLog(path, say=said.append).close()
    assert path.is_file() and "damaged" in said[0]


def test_a_skipped_step_and_a_spike_are_rows_like_others(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("train", 1, skipped=1, documents="3 (austen), 7 (kjv)")
    log.write("train", 2, loss=4.0, spike=1, spike_limit=2.0, documents="9 (devil)")
    log.write("spike", 2, loss=4.0, micro_batches=[{"documents": [9]}])
    log.close()
    assert steps(path) == [1, 2, 2]
