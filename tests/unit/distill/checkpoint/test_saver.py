"""Checkpoint folders: a torn or changed one is passed over, another run's is refused, old ones go."""

from __future__ import annotations

import errno
import random
import shutil
import threading

import numpy as np
import pytest
import torch

from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.checkpoint import rank_files, saver
from kdscale.distill.checkpoint.rank_files import RankFileIndex, RankFileReader
from kdscale.distill.schedule import seed_step
from kdscale.errors import RunFolderError
from kdscale.models.parameter_map import ParameterRange

PRINT = {"seed": 1, "distill": {"seq_len": 8}}


class Values:
    """What ZeroState is for an engine: one parameter of 30 values, all of them `step`."""

    def __init__(self):
        self.shapes, self.tied, self.adam_step = {"w": (5, 6)}, {"head": "w"}, 7
        self.ranges, self.value = [ParameterRange("w", 0, 20), ParameterRange("w", 20, 10)], 0.0

    def blocks(self):
        for _ in rank_files.QUANTITIES:
            for piece in self.ranges:
                yield torch.full((piece.length,), self.value)


def make_saver(folder, keep=5, **rules):
    values = Values()
    return values, saver.Saver(
        folder, values, {"fingerprint": PRINT}, saver.SavePolicy(keep, **rules), torch.device("cpu")
    )


def save(folder, *steps, **rules):
    values, made = make_saver(folder, **rules)
    for step in steps:
        values.value = float(step)
        made.save(step, {"state": {"step": step}}, wait=True)
    return checkpoint_folder.step_dir(folder, steps[-1])


def names(folder):
    return [path.name for path in checkpoint_folder.sealed_checkpoints(folder)]


def test_newest_whole_one_is_found(tmp_path):
    save(tmp_path, 3, 6, 9)
    found = checkpoint_folder.find_latest(tmp_path, PRINT)
    assert (found.path, found.step, found.notes) == (tmp_path / "step-00000009", 9, ())
    assert found.manifest["state"] == {"step": 9}
    assert found.manifest["adam_step"] == 7
    index = RankFileIndex(checkpoint_folder.data_files(found.path, found.manifest), found.manifest["parameters"])
    with RankFileReader(index) as reader:
        reader.fill("exp_avg", ParameterRange("w", 15, 10), out := torch.zeros(10))
    assert out.tolist() == [9.0] * 10


def test_no_folder_is_no_checkpoint(tmp_path):
    assert checkpoint_folder.find_latest(tmp_path / "none", PRINT) == checkpoint_folder.LatestCheckpoint(None, {}, ())


def flip(path):
    data = bytearray(path.read_bytes())
    data[-5] ^= 1  # in the last moment
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:50])


def drop(path):
    path.unlink()


def lose_manifest(path):
    (path.parent / checkpoint_folder.MANIFEST).unlink()


def change_manifest(path):
    manifest = path.parent / checkpoint_folder.MANIFEST
    manifest.write_text(manifest.read_text().replace('"adam_step": 7', '"adam_step": 8'))


@pytest.mark.parametrize("damage", [flip, cut, drop, lose_manifest, change_manifest])
def test_a_damaged_one_is_passed_over_and_named(tmp_path, damage):
    save(tmp_path, 3, 6)
    damage(tmp_path / "step-00000006" / "rank-00000.safetensors")
    found = checkpoint_folder.find_latest(tmp_path, PRINT)
    assert found.step == 3
    assert "step-00000006" in found.notes[0]
    save(tmp_path, 6)  # and can be written again over the damaged one
    assert checkpoint_folder.find_latest(tmp_path, PRINT).step == 6


def test_a_damaged_one_does_not_push_a_good_one_out(tmp_path):
    """Else two damages in a row would leave nothing, however many are kept."""
    flip(save(tmp_path, 10, 20, 25, keep=2) / "rank-00000.safetensors")
    assert checkpoint_folder.find_latest(tmp_path, PRINT).step == 20
    assert names(tmp_path) == ["step-00000020"]
    assert (tmp_path / "damaged-step-00000025").is_dir()
    flip(save(tmp_path, 30, keep=2) / "rank-00000.safetensors")
    assert not (tmp_path / "damaged-step-00000025").exists()
    assert checkpoint_folder.find_latest(tmp_path, PRINT).step == 20


def test_all_damaged_is_as_none(tmp_path):
    flip(save(tmp_path, 3) / "rank-00000.safetensors")
    found = checkpoint_folder.find_latest(tmp_path, PRINT)
    assert (found.path, found.step, len(found.notes)) == (None, 0, 1)
    assert save(tmp_path, 3) == checkpoint_folder.find_latest(tmp_path, PRINT).path


def test_weights_can_be_verified_without_the_moments(tmp_path):
    path = save(tmp_path, 3)
    flip(path / "rank-00000.safetensors")
    assert checkpoint_folder.verify(path, weights_only=True)["step"] == 3
    about = checkpoint_folder.read_manifest(path)["files"]["rank-00000.safetensors"]
    assert about["bytes"] - about["weights_bytes"] == 2 * 30 * 4


def test_a_half_written_one_is_not_seen(tmp_path):
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "step-00000003", tmp_path / ".partial-step-00000006")
    assert checkpoint_folder.find_latest(tmp_path, PRINT).step == 3
    assert not (tmp_path / ".partial-step-00000006").exists()


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert names(tmp_path) == ["step-00000004", "step-00000003"]


def test_some_are_kept_for_ever(tmp_path):
    save(tmp_path, *range(1, 9), keep=2, keep_every=3)
    assert names(tmp_path) == ["step-00000008", "step-00000007", "step-00000006", "step-00000003"]


def test_another_runs_checkpoint_is_refused_with_what_differs(tmp_path):
    path = save(tmp_path, 3)
    with pytest.raises(RunFolderError, match=r"distill.seq_len: 8 → 16"):
        checkpoint_folder.find_latest(tmp_path, {"seed": 1, "distill": {"seq_len": 16}})
    assert path.exists()


# --- in the background


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
    made.poll()
    assert names(tmp_path) == []
    held_disk.set()
    wait_for(made)
    assert names(tmp_path) == []  # sealed only where all ranks meet
    made.poll()
    assert names(tmp_path) == ["step-00000004"]
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
    assert names(tmp_path) == ["step-00000002", "step-00000001"]


def test_a_full_disk_is_an_error_at_the_next_step(tmp_path, held_disk):
    held_disk.set()
    save(tmp_path, 1)
    held_disk.fault = OSError(errno.ENOSPC, "No space left on device")
    _, made = make_saver(tmp_path, background=True)
    made.save(2, {}, wait=False)
    wait_for(made)
    with pytest.raises(RunFolderError, match="rank 0: No space left on device"):
        made.poll()
    assert checkpoint_folder.find_latest(tmp_path, PRINT).step == 1


def test_a_rank_that_leaves_does_not_seal(tmp_path, held_disk):
    _, made = make_saver(tmp_path, background=True)
    made.save(1, {}, wait=False)
    made._pending._cancelled.set()
    held_disk.set()
    made.close()
    made.poll()
    assert names(tmp_path) == []


def draw():
    return (torch.rand(3).tolist(), random.random(), float(np.random.rand()))


def test_a_step_draws_the_same_numbers_every_time():
    seed_step(1, 5, 0)
    first = draw()
    assert first != draw()
    others = []
    for other in ((2, 5, 0), (1, 6, 0), (1, 5, 1)):
        seed_step(*other)
        others.append(draw())
    seed_step(1, 5, 0)
    assert first == draw()
    assert len({repr(one) for one in [first, *others]}) == 4
