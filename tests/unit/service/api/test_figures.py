"""Metrics and logs: as they grow, thinned without losing spikes, without secrets."""

from __future__ import annotations

import asyncio
import json
import math
import os
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI
from hypothesis import given
from hypothesis import strategies as st

from kdscale.service.api.metrics import TrainingLogs, thin
from kdscale.service.api.streaming import logs
from kdscale.service.database.runs import Run
from tests.unit.service.api.conftest import Caller, metrics_log
from tests.unit.service.api.test_events import OpenStream, stream

__all__ = ["stream"]


@given(st.lists(st.floats(-1e6, 1e6), max_size=400), st.integers(4, 60))
def test_thinning_keeps_ends_and_extremes(values: list[float], most: int) -> None:
    kept = thin(values, most)
    assert kept == sorted(set(kept)) and len(kept) <= max(most, 0)
    if values:
        shown = [values[index] for index in kept]
        assert (kept[0], kept[-1]) == (0, len(values) - 1)
        assert (min(shown), max(shown)) == (min(values), max(values))


def test_series_of_a_run(as_: Caller, make_run: Callable[..., Run]) -> None:
    log = metrics_log(500, loss=lambda step: 100.0 if step == 250 else 1 / step, lr=float)
    log += json.dumps({"kind": "validation", "step": 500, "loss": 2.0}) + '\n{"kind": "train", "step": 501, "lo'
    run, reader = make_run(1, {"logs/metrics.jsonl": log}), as_("reader")
    address = f"/v1/runs/{run.id}/metrics"
    found = reader.get(address, params={"max_points": 20, "names": "loss"}).json()
    assert found["names"] == ["train/loss", "train/lr", "validation/loss"] and found["last_step"] == 500
    train, validation = found["series"]
    assert train["name"] == "train/loss" and len(train["steps"]) <= 20 and train["thinned"]
    assert 100.0 in train["values"] and train["steps"][0] == 1 and train["steps"][-1] == 500
    assert validation == {"name": "validation/loss", "steps": [500], "values": [2.0], "thinned": False}
    later = reader.get(address, params={"since_step": 499, "names": "train/lr"}).json()["series"]
    assert later == [{"name": "train/lr", "steps": [499, 500], "values": [499.0, 500.0], "thinned": False}]
    assert reader.get(address, params={"names": "nothing"}).json()["series"] == []


def test_a_log_is_read_on_and_anew_when_it_was_replaced(make_run: Callable[..., Run]) -> None:
    path = make_run(1, {"logs/metrics.jsonl": metrics_log(3, loss=float)}).folder / "logs/metrics.jsonl"
    logs_, lines = TrainingLogs(), metrics_log(6, loss=float).splitlines(keepends=True)
    assert logs_.read(path).last_step == 3
    with path.open("a") as stream_:
        stream_.write(lines[3] + lines[4][:10])  # a row that is being written
    assert logs_.read(path).last_step == 4
    with path.open("a") as stream_:
        stream_.write(lines[4][10:] + "damage\n" + lines[5])
    assert list(logs_.read(path).series["train/loss"][0]) == [1, 2, 3, 4, 5, 6]
    new = path.with_name("new")  # a run that was resumed cuts its log by writing another
    new.write_text("".join(lines[:2]))
    new.replace(path)
    assert list(logs_.read(path).series["train/loss"][1]) == [1.0, 2.0]
    path.unlink()
    os.mkfifo(path)
    assert logs_.read(path).last_step == 2, "what is no file is not waited for"


def test_figures_that_json_lacks_are_left_out(as_: Caller, make_run: Callable[..., Run]) -> None:
    log = metrics_log(3, loss=lambda step: math.nan if step == 2 else 1.0)
    run = make_run(1, {"logs/metrics.jsonl": log})
    (series,) = as_("reader").get(f"/v1/runs/{run.id}/metrics").json()["series"]
    assert series["steps"] == [1, 3]


@pytest.fixture
def printed(app: FastAPI, make_run: Callable[..., Run]) -> tuple[Run, Any]:
    """A run with an output of its first attempt, and a function that prints more."""
    run = make_run(1, {"logs/rank-1.log": "from rank 1\n"})
    file = app.state.settings.jobs / run.id / "1" / logs.OUTPUT
    file.parent.mkdir(parents=True)

    def write(text: str) -> None:
        with file.open("a", encoding="utf-8") as stream_:
            stream_.write(text)

    return run, write


def test_the_end_of_a_log(as_: Caller, printed: tuple[Run, Any]) -> None:
    run, write = printed
    address, reader = f"/v1/runs/{run.id}/logs", as_("reader")
    assert reader.get(address).text == ""
    write("".join(f"line {number}\n" for number in range(1000)) + "half")
    assert reader.get(address, params={"tail": 3}).text == "line 998\nline 999\nhalf\n"
    assert reader.get(address, params={"tail": 0}).text == ""
    assert reader.get(address, params={"rank": 1}).text == "from rank 1\n"
    assert reader.get(address, params={"rank": 7}).text == reader.get(address, params={"attempt": 2}).text == ""
    write("\x1b[2J https://me:secret@host/ hf_abcdefghijklmnopqrst <script>\n")
    answer = reader.get(address, params={"tail": 1})
    assert answer.text == "half\\x1b[2J https://***@host/ hf_*** <script>\n"
    assert answer.headers["content-type"].startswith("text/plain")


def test_a_log_is_followed_into_the_next_start_of_the_run(
    app: FastAPI, printed: tuple[Run, Any], stream: Callable[..., OpenStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_EVERY_SECONDS", 0.005)
    run, write = printed
    write("one\n")
    later = app.state.settings.jobs / run.id / "2" / logs.OUTPUT

    async def client() -> None:
        async with stream(f"/v1/runs/{run.id}/logs?follow=true") as open_:
            assert (await open_.message())["data"] == "one"
            write("paused")
            later.parent.mkdir(parents=True)
            later.write_text("two\n")
            app.state.runs.update(run.id, attempt=2)
            assert (await open_.message())["data"] == "paused"
            assert await open_.message() == {"id": "20000000004", "data": "two"}
        async with stream(f"/v1/runs/{run.id}/logs?follow=true", last_event_id="10000000004") as open_:
            assert await open_.message() == {"id": "10000000010", "data": "paused"}, "which no byte of another one is"
            assert await open_.message() == {"id": "20000000004", "data": "two"}

    asyncio.run(client())


def test_a_log_is_followed_until_the_run_has_ended(
    app: FastAPI, printed: tuple[Run, Any], stream: Callable[..., OpenStream], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logs, "_EVERY_SECONDS", 0.005)
    run, write = printed
    write("one\ntwo\nthree\n")

    async def client() -> None:
        path = f"/v1/runs/{run.id}/logs?tail=1&follow=true"
        async with stream(path) as open_:
            assert await open_.message() == {"id": "10000000014", "data": "three"}
            write("fo")
            write("ur ü\n")
            assert await open_.message() == {"id": "10000000022", "data": "four ü"}
        write("five\nsix")
        async with stream(path, last_event_id="10000000022") as open_:
            assert await open_.message() == {"id": "10000000027", "data": "five"}
            app.state.runs.ask(run.id, "cancel")
            assert await open_.message() == {"id": "10000000030", "data": "six"}
            assert (await open_.message())["event"] == "end"
        async with stream(path, last_event_id="10000000030") as open_:
            assert open_.status == 204, "there is no more, and a browser does not ask again"

    asyncio.run(client())
