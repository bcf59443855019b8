"""The list of hidden states: what is in memory, what is on disk, and that neither shows in the values."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kdscale.errors import FileError
from kdscale.models.hidden_states import HiddenStates, Scratch

SHAPE = (2, 5, 8)
BYTES = 2 * 5 * 8 * 2  # bf16


def _values(seed: int, count: int = 4) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(SHAPE, generator=generator).bfloat16() for _ in range(count)]


def _filled(scratch: Scratch, values: list[torch.Tensor]) -> HiddenStates:
    states = HiddenStates(scratch)
    for value in values:
        states.append(value)
    return states


@pytest.mark.parametrize("budget", [0, BYTES, 2 * BYTES + 1, 100 * BYTES])
def test_a_list_that_keeps_to_its_budget(tmp_path: Path, budget: int) -> None:
    scratch = Scratch(tmp_path / "scratch", budget)
    states = _filled(scratch, _values(1))
    in_memory = sum(states[index] is states[index] for index in range(4))  # from disk it is another tensor every time
    assert in_memory == min(4, budget // BYTES)
    assert all(map(torch.equal, states, _values(1)))
    for index, value in enumerate(_values(2)):
        states[index] = value
        assert torch.equal(states[index], value)
        assert all(map(torch.equal, list(states)[index + 1 :], _values(1)[index + 1 :]))
    assert states[0].dtype == torch.bfloat16
    assert scratch.folder is not None
    spool = scratch.folder / "spool.bin"
    assert (spool.stat().st_size == 4 * BYTES) if in_memory < 4 else not spool.exists()


@pytest.mark.parametrize("budget", [0, 2 * BYTES, 100 * BYTES])
@pytest.mark.parametrize("later", [0, 100 * BYTES])
def test_saved_states_are_read_by_another_process_with_another_budget(tmp_path: Path, budget: int, later: int) -> None:
    states = _filled(Scratch(tmp_path, budget), _values(1))
    slots = states.save(tmp_path / "one.bin")
    states[1] = _values(2)[1]  # after the save: not part of it
    again = HiddenStates.load(tmp_path, slots, Scratch(tmp_path / "other", later))
    assert all(map(torch.equal, again, _values(1)))
    expected = [*_values(1)[:1], _values(2)[1], *_values(1)[2:]]
    assert all(map(torch.equal, states, expected))
    assert states.changed_bytes == BYTES
    slots = states.save(tmp_path / "two.bin")
    assert [slot["file"] for slot in slots] == ["one.bin", "two.bin", "one.bin", "one.bin"]
    assert states.changed_bytes == 0
    for one in (states, HiddenStates.load(tmp_path, slots, Scratch(tmp_path / "o", later))):
        assert all(map(torch.equal, one, expected))
    assert states.save(tmp_path / "three.bin") == slots  # nothing changed, nothing is written
    assert not (tmp_path / "three.bin").exists()


def test_without_a_folder_everything_is_in_memory() -> None:
    states = _filled(Scratch(None, 0), _values(1))
    assert all(states[index] is states[index] for index in range(4))


def test_a_file_that_is_cut_short_is_noticed(tmp_path: Path) -> None:
    states = _filled(Scratch(tmp_path, 0), _values(1))
    slots = states.save(tmp_path / "one.bin")
    with (tmp_path / "one.bin").open("r+b") as stream:
        stream.truncate(3 * BYTES)
    with pytest.raises(FileError, match=r"one\.bin"):
        HiddenStates.load(tmp_path, slots, Scratch(tmp_path, 0))
    with pytest.raises(FileError, match="cut short"):
        states[3]
