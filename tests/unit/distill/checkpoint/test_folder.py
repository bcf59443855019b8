"""Checkpoint folders: a torn or changed one is skipped, another run's is refused, old ones are removed."""

from __future__ import annotations

import json
import shutil

import pytest
import torch

from kdscale.distill.checkpoint import folder as checkpoint_folder
from kdscale.distill.checkpoint.rank_files import RankFileIndex, RankFileReader
from kdscale.errors import RunFolderError
from kdscale.files import sha256_json
from kdscale.models.parameter_map import ParameterRange
from tests.unit.distill.checkpoint.saving import FINGERPRINT, save, sealed_names


def test_the_newest_valid_one_is_found(tmp_path):
    save(tmp_path, 3, 6, 9)
    latest = checkpoint_folder.find_latest(tmp_path, FINGERPRINT)
    assert (latest.path, latest.step, latest.notes) == (tmp_path / "step-00000009", 9, ())
    assert latest.manifest["state"] == {"step": 9}
    assert latest.manifest["adam_step"] == 7
    index = RankFileIndex(checkpoint_folder.data_files(latest.path, latest.manifest), latest.manifest["parameters"])
    with RankFileReader(index) as reader:
        reader.fill("exp_avg", ParameterRange("w", 15, 10), out := torch.zeros(10))
    assert out.tolist() == [9.0] * 10


def test_no_folder_is_no_checkpoint(tmp_path):
    assert checkpoint_folder.find_latest(tmp_path / "none", FINGERPRINT) == checkpoint_folder.LatestCheckpoint(
        None, {}, ()
    )


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


def forged(**changes):
    """Another content of the manifest with a hash that is right."""

    def forge(path):
        manifest = json.loads((path.parent / checkpoint_folder.MANIFEST).read_text())
        del manifest["sha256"]
        manifest |= changes
        manifest["sha256"] = sha256_json(manifest)
        (path.parent / checkpoint_folder.MANIFEST).write_text(json.dumps(manifest))

    return forge


def other_kind(text):
    return lambda path: (path.parent / checkpoint_folder.MANIFEST).write_text(text)


FORGERIES = [
    forged(files=[]), forged(files={"rank-00000.safetensors": 1}), forged(files={"x": {"bytes": "1"}}),
    forged(step="6"), forged(fingerprint=None), forged(parameters=[]), forged(adam_step=None), other_kind("[]"),
    other_kind("null"), other_kind('{"format": 2, "sha256": NaN, "x": NaN}'), other_kind("[" * 5000),
    other_kind("9" * 5000),
]  # fmt: skip


@pytest.mark.parametrize("damage", [flip, cut, drop, lose_manifest, change_manifest, *FORGERIES])
def test_a_damaged_one_is_skipped_and_named(tmp_path, damage):
    save(tmp_path, 3, 6)
    damage(tmp_path / "step-00000006" / "rank-00000.safetensors")
    latest = checkpoint_folder.find_latest(tmp_path, FINGERPRINT)
    assert latest.step == 3
    assert "step-00000006" in latest.notes[0]
    save(tmp_path, 6)  # and can be written again over the damaged one
    assert checkpoint_folder.find_latest(tmp_path, FINGERPRINT).step == 6


def test_a_damaged_one_does_not_push_a_good_one_out(tmp_path):
    """Else two damages in a row would leave nothing, however many are kept."""
    flip(save(tmp_path, 10, 20, 25, keep=2) / "rank-00000.safetensors")
    assert checkpoint_folder.find_latest(tmp_path, FINGERPRINT).step == 20
    assert sealed_names(tmp_path) == ["step-00000020"]
    assert (tmp_path / "damaged-step-00000025").is_dir()
    flip(save(tmp_path, 30, keep=2) / "rank-00000.safetensors")
    assert not (tmp_path / "damaged-step-00000025").exists()
    assert checkpoint_folder.find_latest(tmp_path, FINGERPRINT).step == 20


def test_all_damaged_is_as_none(tmp_path):
    flip(save(tmp_path, 3) / "rank-00000.safetensors")
    latest = checkpoint_folder.find_latest(tmp_path, FINGERPRINT)
    assert (latest.path, latest.step, len(latest.notes)) == (None, 0, 1)
    assert save(tmp_path, 3) == checkpoint_folder.find_latest(tmp_path, FINGERPRINT).path


def test_weights_can_be_verified_without_the_moments(tmp_path):
    path = save(tmp_path, 3)
    flip(path / "rank-00000.safetensors")
    assert checkpoint_folder.verify(path, weights_only=True)["step"] == 3
    about = checkpoint_folder.read_manifest(path)["files"]["rank-00000.safetensors"]
    assert about["bytes"] - about["weights_bytes"] == 2 * 30 * 4


def test_a_half_written_one_is_not_seen(tmp_path):
    save(tmp_path, 3)
    shutil.copytree(tmp_path / "step-00000003", tmp_path / ".partial-step-00000006")
    assert checkpoint_folder.find_latest(tmp_path, FINGERPRINT).step == 3
    assert not (tmp_path / ".partial-step-00000006").exists()


def test_only_the_newest_are_kept(tmp_path):
    save(tmp_path, 1, 2, 3, 4, keep=2)
    assert sealed_names(tmp_path) == ["step-00000004", "step-00000003"]


def test_some_are_kept_for_ever(tmp_path):
    save(tmp_path, *range(1, 9), keep=2, keep_every=3)
    assert sealed_names(tmp_path) == ["step-00000008", "step-00000007", "step-00000006", "step-00000003"]


def test_another_runs_checkpoint_is_refused_with_what_differs(tmp_path):
    path = save(tmp_path, 3)
    with pytest.raises(RunFolderError, match=r"distill.seq_len: 8 → 16"):
        checkpoint_folder.find_latest(tmp_path, {"seed": 1, "distill": {"seq_len": 16}})
    assert path.exists()
