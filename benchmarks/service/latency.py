"""How long the service takes to answer, with many runs in its list and many open streams of events.

    python benchmarks/service/latency.py --runs 1000 --streams 100 --seconds 30 --out latency.json

Fills a home folder with ended runs (folder, events, training log), starts `kdscale serve` on it, opens the streams over
real connections, has a process of its own write events meanwhile, and asks for the list, one run and its events from a
few clients at once. Prints the percentiles, and how late events came to the streams; leaves with 1 when a p95 is above
the limit, or an event did not come to every stream in its order.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psutil

from kdscale.config.load import build_config, dump_config
from kdscale.files import write_json
from kdscale.pipeline.stages.registry import stages_of
from kdscale.service.database.connection import open_database
from kdscale.service.database.events import Events, append_event
from kdscale.service.database.folders import write_run_folder
from kdscale.service.database.runs import NewRun, Runs
from kdscale.service.ids import new_run_id
from kdscale.service.settings import SETTINGS_FILE, ServiceSettings
from kdscale.service.watching.folder_progress import last_change

_LIMITS = "limits: {requests_per_minute: 60000, event_streams: 1000}\n"
_OWNERS = ("ada", "bob", "cyd", "dan")
_EVENTS_A_RUN, _ROWS_A_RUN = 20, 200
_READY_SECONDS = 60.0


def main() -> None:
    """Measure, and print what came out."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--streams", type=int, default=100)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--events-a-second", type=float, default=5.0)
    parser.add_argument("--limit-ms", type=float, default=100.0)
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder) / "home"
        ids = fill(home, asked.runs)
        server, url = start(home)
        try:
            token = (home / "first-token").read_text(encoding="ascii").strip()
            process, load = psutil.Process(server.pid), os.getloadavg()[0]
            before = sum(process.cpu_times()[:2])
            found = asyncio.run(measure(home, url, token, ids, asked))
            spent = sum(process.cpu_times()[:2]) - before
            count = sum(row["count"] for row in found["requests"].values())
            found |= {"load_before": round(load, 1), "cpu_ms_a_request": round(1000 * spent / count, 2)}
        finally:
            server.send_signal(signal.SIGTERM)
            server.wait(30)
    show(found, asked)
    if asked.out is not None:
        write_json(asked.out, found)
    late = [name for name, row in found["requests"].items() if row["p95"] > asked.limit_ms]
    if late or found["streams"]["broken"]:
        sys.exit(f"above {asked.limit_ms:g} ms: {', '.join(late) or 'none'}; broken: {found['streams']['broken']}")


def fill(home: Path, count: int) -> list[str]:
    """Ended runs as the service leaves them; returns their ids."""
    home.mkdir(parents=True)
    (home / SETTINGS_FILE).write_text(_LIMITS, encoding="utf-8")
    database = open_database(ServiceSettings(home=str(home)))
    runs, ids = Runs(database), []
    with database.begin() as connection:
        for number in range(count):
            new = run_folder(home, number)
            runs.add_in(connection, new)
            for step in range(_EVENTS_A_RUN):
                data = {"stage": "distill", "state": "running", "step": step}
                append_event(connection, new.id, new.created, "stage", data)
            ids.append(new.id)
    for run_id in ids:  # as the watcher leaves it; how long its first look at them takes is another question
        runs.set_progress(run_id, {"stage": "report", "share": 1.0, "moved": last_change(home / "runs" / run_id)})
    database.close()
    return ids


def run_folder(home: Path, number: int) -> NewRun:
    """The folder of one ended run."""
    run_id = new_run_id(1_700_000_000 + number)
    place = home / "runs" / run_id
    tree = {"name": f"run-{number}", "run_dir": str(place), "teacher": {"path": "hf:org/model"},
            "prune": {"target_params": "50%"}}  # fmt: skip
    config = build_config(tree, "benchmark")
    new = NewRun(
        name=f"run {number}", owner=_OWNERS[number % 4], config=config.resolved(), folder=place, id=run_id,
        state="succeeded" if number % 3 else "failed", exit_code=0 if number % 3 else 6,
    )  # fmt: skip
    (place / "logs").mkdir(parents=True)
    (place / "config.yaml").write_text(dump_config(config), encoding="utf-8")
    write_run_folder(new)
    done = {"state": "done", "seconds": 3.0, "facts": {"tokens": "1,000"}}
    write_json(place / "status.json", {"stages": {stage.name: done for stage in stages_of(config)}})
    rows = ({"kind": "train", "step": step, "loss": 1 / step, "lr": 1e-4} for step in range(1, _ROWS_A_RUN + 1))
    (place / "logs/metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return new


def start(home: Path) -> tuple[subprocess.Popen[str], str]:
    """The service, once it answers, and its address."""
    command = [sys.executable, "-m", "kdscale.cli.main", "serve", "--home", str(home), "--port", "0"]
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    with (home / "printed.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environment)
    assert server.stdout is not None
    url = ""
    for line in server.stdout:
        if match := re.search(r"https?://\S+", line):
            url = match[0]
            break
    threading.Thread(target=server.stdout.read, daemon=True).start()  # so that the pipe never fills
    until = time.monotonic() + _READY_SECONDS
    while time.monotonic() < until:
        try:
            if httpx.get(f"{url}/readyz").status_code == 200:
                return server, url
        except httpx.TransportError:
            time.sleep(0.1)
    raise SystemExit("the service did not become ready")


async def measure(home: Path, url: str, token: str, ids: list[str], asked: argparse.Namespace) -> dict[str, Any]:
    """The times of the answers, and of the events on the streams."""
    headers = {"authorization": f"Bearer {token}"}
    seen: list[list[tuple[int, float]]] = [[] for _ in range(asked.streams)]
    stop = threading.Event()
    written: list[int] = []
    writer = threading.Thread(target=write_events, args=(home, ids, asked.events_a_second, stop, written))
    common: dict[str, Any] = {"base_url": url, "headers": headers, "timeout": 60}
    async with AsyncExitStack() as stack:
        many = httpx.Limits(max_connections=None)
        listener = await stack.enter_async_context(httpx.AsyncClient(**common, limits=many))
        client = await stack.enter_async_context(httpx.AsyncClient(**common))
        opened = [asyncio.Event() for _ in seen]
        listening = [
            asyncio.create_task(listen(listener, rows, ready)) for rows, ready in zip(seen, opened, strict=True)
        ]
        await asyncio.gather(*(ready.wait() for ready in opened))
        writer.start()
        times = await ask_all(client, ids, asked)
        stop.set()
        writer.join()
        await asyncio.sleep(3.0)  # for the last events
        for task in listening:
            task.cancel()
        await asyncio.gather(*listening, return_exceptions=True)
    broken = sum([number for number, _ in rows] != written for rows in seen)
    late = [seconds for rows in seen for _, seconds in rows]
    return {
        "runs": len(ids), "streams_open": asked.streams, "clients": asked.clients, "events_written": len(written),
        "requests": {name: percentiles(found) for name, found in times.items()},
        "streams": {"broken": broken, "behind": percentiles(late)},
        "requests_a_second": round(sum(map(len, times.values())) / asked.seconds, 1),
    }  # fmt: skip


def write_events(home: Path, ids: list[str], rate: float, stop: threading.Event, written: list[int]) -> None:
    """Events of random runs, as the watcher writes them."""
    database = open_database(ServiceSettings(home=str(home)))
    events, chance = Events(database), random.Random(0)
    while not stop.wait(1 / rate):
        written.append(events.append(chance.choice(ids), "stage", {"stage": "eval", "state": "running"}))
    database.close()


async def listen(client: httpx.AsyncClient, rows: list[tuple[int, float]], ready: asyncio.Event) -> None:
    """The number of every event of a stream, and how many seconds after it was written it came."""
    async with client.stream("GET", "/v1/events", headers={"accept": "text/event-stream"}) as answer:
        answer.raise_for_status()
        ready.set()
        async for line in answer.aiter_lines():
            if line.startswith("data: "):
                event = json.loads(line.removeprefix("data: "))
                rows.append((event["seq"], time.time() - datetime.fromisoformat(event["time"]).timestamp()))


async def ask_all(client: httpx.AsyncClient, ids: list[str], asked: argparse.Namespace) -> dict[str, list[float]]:
    """Milliseconds of each kind of request, from all clients until the time is over."""
    times: dict[str, list[float]] = defaultdict(list)
    chance = random.Random(1)
    kinds: dict[str, Callable[[], str]] = {
        "list": lambda: "/v1/runs?limit=50",
        "list, filtered": lambda: f"/v1/runs?owner={chance.choice(_OWNERS)}&state=failed&search=run",
        "detail": lambda: f"/v1/runs/{chance.choice(ids)}",
        "events": lambda: f"/v1/runs/{chance.choice(ids)}/events?limit=100",
        "metrics": lambda: f"/v1/runs/{chance.choice(ids)}/metrics?max_points=200",
    }
    until = time.monotonic() + asked.seconds

    async def one_client() -> None:
        while time.monotonic() < until:
            for name, address in kinds.items():
                begun = time.perf_counter()
                answer = await client.get(address())
                answer.raise_for_status()
                times[name].append(1000 * (time.perf_counter() - begun))

    await asyncio.gather(*(one_client() for _ in range(asked.clients)))
    return times


def percentiles(values: list[float]) -> dict[str, Any]:
    """The middle, p95 and p99 and the largest of some values, and how many there are."""
    cuts = statistics.quantiles(values, n=100) if len(values) > 1 else [0.0] * 99
    return {"count": len(values), **{f"p{n}": round(cuts[n - 1], 3) for n in (50, 95, 99)},
            "most": round(max(values, default=0.0), 3)}  # fmt: skip


def show(found: dict[str, Any], asked: argparse.Namespace) -> None:
    """Print the tables."""
    open_ones = f"{found['streams_open']} open streams, {found['clients']} clients"
    print(f"{found['runs']} runs, {open_ones}, {asked.seconds:g} s; load before: {found['load_before']}")
    cost = f"{found['cpu_ms_a_request']} ms of a processor for each, streams included"
    print(f"{found['requests_a_second']} requests a second, {cost}")
    print(f"{'ms':16}" + "".join(f"{name:>9}" for name in ("count", "p50", "p95", "p99", "most")))
    for name, row in found["requests"].items():
        print(f"{name:16}{row['count']:9}" + "".join(f"{row[key]:9.1f}" for key in ("p50", "p95", "p99", "most")))
    behind = found["streams"]["behind"]
    print(f"{found['events_written']} events to every stream, {found['streams']['broken']} streams broken")
    print(f"seconds behind: p50 {behind['p50']:.2f}, p95 {behind['p95']:.2f}, most {behind['most']:.2f}")


if __name__ == "__main__":
    main()
