"""What the page of the machine shows: devices and who holds them, who waits, and how much room there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import Request

from kdscale.service.api.catalogue import machine
from kdscale.service.api.schemas import MachineFacts
from kdscale.service.database.runs import Run
from kdscale.service.page.facts.tiles import Tile
from kdscale.service.states import ACTIVE
from kdscale.units import format_size

_WAITING = 50  # runs of the queue that are shown


@dataclass(frozen=True)
class Device:
    """A device or slot, what it has, and the run that holds it."""

    name: str
    memory: str
    busy: str
    run: Run | None = None


def live(request: Request) -> dict[str, Any]:
    """All of the page: it changes with every run that begins or ends."""
    facts, runs = machine(request), request.app.state.runs
    running = runs.in_states(ACTIVE)
    waiting = facts.counts.get("queued", 0)
    return {
        "devices": devices(facts, running), "tiles": _tiles(facts), "queue": runs.queue(_WAITING),
        "more_queued": waiting if waiting > _WAITING else 0,
        "elsewhere": [run for run in running if run.target.get("engine", "local") != "local"],
    }  # fmt: skip


def devices(facts: MachineFacts, running: Sequence[Run]) -> list[Device]:
    """The GPUs in their order, or where there are none the slots, each with the run that holds it."""
    if not facts.gpus:
        local = [run for run in running if run.target.get("engine", "local") == "local"]
        held: list[Run | None] = [run for run in local for _ in range(run.slots)]
        held += [None] * (facts.slots - len(held))
        return [Device(f"slot {number}", "", "", run) for number, run in enumerate(held)]
    by_id = {run.id: run for run in running}
    found = []
    for number, gpu in enumerate(facts.gpus):
        holder = facts.held.get(gpu["uuid"]) or facts.held.get(str(number)) or ""
        used, total, busy = gpu["used_bytes"] or 0, gpu["memory_bytes"], gpu["busy"]
        memory = f"{format_size(used)} of {format_size(total)}" if total else ""
        found.append(Device(gpu["name"], memory, "" if busy is None else f"{busy:.0%}", by_id.get(holder)))
    return found


def _tiles(facts: MachineFacts) -> list[Tile]:
    in_use = min(1.0, facts.slots_held / max(1, facts.slots))
    return [
        Tile("Slots in use", f"{facts.slots_held} of {facts.slots}", share=in_use),
        Tile("Waiting", f"{facts.counts.get('queued', 0):,}", "runs"),
        _room("Disk", facts.disk_free_bytes, facts.disk_bytes),
        _room("Memory", facts.memory_free_bytes, facts.memory_bytes),
        Tile("Processors", str(facts.processors), f"load {facts.load:.1f}"),
    ]


def _room(title: str, free: int, total: int) -> Tile:
    return Tile(title, format_size(free), f"free of {format_size(total)}", 1 - free / max(1, total))
