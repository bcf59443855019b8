"""A save in the background: training goes on, errors come at the next step, a rank that leaves seals nothing."""

from __future__ import annotations

import errno
import threading

import pytest
import torch

from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.checkpoint import rank_files, saver
from kdscale.distill.checkpoint.rank_files import RankFileIndex, RankFileReader
from kdscale.errors import RunFolderError
from kdscale.models.parameter_map import ParameterRange
from tests.unit.distill.checkpoint.saving import FINGERPRINT, make_saver, save, sealed_names


@pytest.fixture
def held_disk(monkeypatch):
    """A disk that takes nothing until `set()`; with `fault`, it then refuses."""
    gate, real = threading.Event(), rank_files.write_rank_file
    gate.fault = None

    def write(*args):
        assert gate.wait(20)
        if gate.fault:
            raise gate.fault
        return real(*args)

    monkeypatch.setattr(saver, "write_rank_file", write)
    return gate


def wait_for(made):
    made._pending.join(20)


def test_training_goes_on_while_the_disk_works(tmp_path, held_disk):
    values, made = make_saver(tmp_path, background=True)
    values.value = 4.0
    made.save(4, {}, wait=False)
    values.value = 5.0  # the next step changes the weights
    assert not made.written
    assert sealed_names(tmp_path) == []
    held_disk.set()
    wait_for(made)
    assert made.written
    assert sealed_names(tmp_path) == []  # sealed only where all ranks meet
    made.finish()
    assert not made.written
    assert sealed_names(tmp_path) == ["step-00000004"]
    with RankFileReader(
        RankFileIndex([tmp_path / "step-00000004" / checkpoint_folder.rank_file(0)], values.shapes)
    ) as r:
        r.fill("master", ParameterRange("w", 0, 30), out := torch.zeros(30))
    assert out.tolist() == [4.0] * 30


def test_a_second_save_waits_for_the_first(tmp_path, held_disk):
    _, made = make_saver(tmp_path, background=True)
    made.save(1, {}, wait=False)
    threading.Timer(0.05, held_disk.set).start()
    made.save(2, {}, wait=True)
    assert sealed_names(tmp_path) == ["step-00000002", "step-00000001"]


def test_a_full_disk_is_an_error_at_the_next_step(tmp_path, held_disk):
    held_disk.set()
    save(tmp_path, 1)
    held_disk.fault = OSError(errno.ENOSPC, "No space left on device")
    _, made = make_saver(tmp_path, background=True)
    made.save(2, {}, wait=False)
    wait_for(made)
    assert made.written
    with pytest.raises(RunFolderError, match="rank 0: No space left on device"):
        made.finish()
    assert checkpoint_folder.find_latest(tmp_path, FINGERPRINT).step == 1


def test_a_rank_that_leaves_does_not_seal(tmp_path, held_disk):
    _, made = make_saver(tmp_path, background=True)
    made.save(1, {}, wait=False)
    made._pending._cancelled.set()
    held_disk.set()
    made.close()
    assert not made.written
    assert sealed_names(tmp_path) == []
