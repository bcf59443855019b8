"""Checkpoint folders: a torn or changed one is passed over, another run's is refused, old ones go."""

from __future__ import annotations

import random
import shutil

import numpy as np
import pytest
import torch

from kdscale.distill import state
from kdscale.errors import RunFolderError

PRINT = {"seed": 1, "distill": {"seq_len": 8}}


def save(folder, step, keep=5):
    def write(tmp):
        (tmp / "deepspeed").mkdir()
        (tmp / "deepspeed" / "weights.pt").write_bytes(bytes([step]) * 100)

    return state.save(folder, step, write=write, state={"loader": {"step": step}}, fingerprint=PRINT, keep=keep)


def test_newest_whole_one_is_found(tmp_path):
    for step in (3, 6, 9):
        save(tmp_path, step)
    found = state.find(tmp_path, PRINT)
    assert (found.path, found.step, found.notes) == (tmp_path / "step-00000009", 9, ())
    assert state.read_rank_state(found.path)["loader"] == {"step": 9}


def test_no_folder_is_no_checkpoint(tmp_path):
    assert state.find(tmp_path / "none", PRINT) == state.Found(None, 0, ())


def flip(path):
    data = bytearray(path.read_bytes())
    data[50] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:50])


def drop(path):
    path.unlink()


def lose_manifest(path):
    (path.parents[1] / state.MANIFEST).unlink()


@pytest.mark.parametrize("damage", [flip, cut, drop, lose_manifest])
def test_a_damaged_one_is_passed_over_and_named(tmp_path, damage):
    for step in (3, 6):
        save(tmp_path, step)
    damage(tmp_path / "step-00000006" / "deepspeed" / "weights.pt")
    found = state.find(tmp_path, PRINT)
    assert found.step == 3
    assert "step-00000006" in found.notes[0]
    save(tmp_path, 6)  # and can be written again over the damaged one
    assert state.find(tmp_path, PRINT).step == 6


def test_a_half_written_one_is_not_seen(tmp_path):
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "step-00000003", tmp_path / ".partial-step-00000006")
    assert state.find(tmp_path, PRINT).step == 3
    assert not (tmp_path / ".partial-step-00000006").exists()


def test_only_the_newest_are_kept(tmp_path):
    for step in (1, 2, 3, 4):
        save(tmp_path, step, keep=2)
    assert [path.name for path in state.complete_steps(tmp_path)] == ["step-00000004", "step-00000003"]


def test_another_runs_checkpoint_is_refused_with_what_differs(tmp_path):
    path = save(tmp_path, 3)
    with pytest.raises(RunFolderError, match=r"distill.seq_len: 8 → 16"):
        state.find(tmp_path, {"seed": 1, "distill": {"seq_len": 16}})
    assert path.exists()


def test_all_generators_go_on_where_they_were():
    saved = state.rng_state()
    first = (torch.rand(3).tolist(), random.random(), float(np.random.rand()))
    assert first != (torch.rand(3).tolist(), random.random(), float(np.random.rand()))
    state.restore_rng(saved)
    assert first == (torch.rand(3).tolist(), random.random(), float(np.random.rand()))
