"""Targets that are stored: the stage that writes them, and distillations from them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from kdscale.config.root import Config
from kdscale.data.batches import PackedLoader
from kdscale.data.token_store import TokenStore
from kdscale.distill.step import to_device
from kdscale.errors import ConfigError, DataError
from kdscale.pipeline.stage import StageContext
from kdscale.pipeline.stages.targets import write_targets
from kdscale.pipeline.target_writing import write_own_shards
from kdscale.teacher import online
from kdscale.teacher.store.cached import read_rows
from kdscale.teacher.store.format import read_header
from kdscale.teacher.store.reader import StoreReader
from kdscale.teacher.store.writer import ShardWriter
from tests.integration.forks import fork_ranks

CachedRun = Callable[..., StageContext]
Distil = Callable[..., list[dict[str, Any]]]

TOP_K = [{"name": "token_divergence", "top_k": 16}]
SAMPLED = [{"name": "token_divergence", "targets": "sampled", "draws": 20}]
STORED = {"codec": {"name": "sampled", "draws": 20}, "micro_batch": 2}
SHORT = {"tokens": 2 * 4 * 48, "validate_every": 2, "validate_tokens": 100, "objectives": SAMPLED}


@pytest.mark.parametrize(
    ("objectives", "codec"),
    [
        (TOP_K, {"name": "topk", "top_k": 24, "bits": 32}),
        (SAMPLED, STORED["codec"]),
        (TOP_K, {"name": "hidden", "dtype": "float32"}),
    ],
    ids=["topk, more than needed", "sampled", "hidden"],
)
def test_stored_targets_give_the_losses_of_an_online_teacher(
    distil: Distil, cached_run: CachedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objectives: Any, codec: Any
) -> None:
    """Bit for bit where the codec is exact, and no weight of the teacher but its head is read."""
    here = distil(tmp_path / "here", objectives=objectives)
    targets = {"codec": codec, "micro_batch": 2}
    assert write_targets(cached_run(tmp_path / "there", targets, objectives=objectives))["positions"] == "1,719"
    monkeypatch.setattr(online, "place_teacher", lambda *_, **__: pytest.fail("the teacher was loaded"))
    there = distil(tmp_path / "there", objectives=objectives, targets=targets, teacher_placement="cached")
    assert [row["loss"] for row in there] == [row["loss"] for row in here]


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_any_number_of_writers_and_kills_leave_the_same_bytes(
    cached_run: CachedRun, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage in one process; then ranks that are forks of this one, where a writer was stopped before."""
    settings = {**STORED, "shard_tokens": 4 * 48, "micro_batch": 3}
    write_targets(cached_run(tmp_path / "one", settings, **SHORT))
    whole = content(tmp_path / "one" / "targets")
    assert read_header(tmp_path / "one" / "targets").shards >= 3
    append = ShardWriter.append

    def stop(self: ShardWriter, block: Any) -> None:
        append(self, block)
        if self.next == 2:
            raise KeyboardInterrupt

    for writers in (2, 4):
        context = cached_run(tmp_path / f"by-{writers}", settings, **SHORT)
        folder = context.run.path / "targets"
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(ShardWriter, "append", stop)
            write_targets(context)
        assert 0 < len(content(folder)) < len(whole)
        assert (
            fork_ranks(writers, lambda rank, context=context, of=writers: _write_share(context, rank, of))
            == [0] * writers
        )
        assert content(folder) == whole


def _write_share(context: StageContext, rank: int, ranks: int) -> None:
    assert context.config.targets is not None
    context, cpu = replace(context, ranks=ranks), torch.device("cpu")
    write_own_shards(context, context.config.targets, context.run.path / "targets", rank, cpu)


def test_runs_share_a_store_that_is_bound_to_teacher_text_and_packing(
    cached_run: CachedRun, make_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = {**STORED, "path": str(tmp_path / "store")}
    facts = write_targets(cached_run(tmp_path / "first", shared, **SHORT))
    monkeypatch.setattr(ShardWriter, "append", lambda *_: pytest.fail("a finished store was written again"))
    again = cached_run(tmp_path / "second", shared, **{**SHORT, "tokens": 4 * 48, "global_batch": 2})
    assert write_targets(again) == facts
    assert (tmp_path / "second" / "targets").is_symlink()

    def refused(expected: str, **changes: Any) -> None:
        context = cached_run(tmp_path / "other", {**shared, **changes.pop("targets", {})}, **{**SHORT, **changes})
        with pytest.raises(ConfigError, match=expected):
            write_targets(context)

    refused(r"seq_len: the store has 48, this run 24", seq_len=24)
    refused(r"packing.validate_tokens: the store has 100, this run 90", validate_tokens=90)
    refused(r"training sequences: 8 are covered, 16 are wanted", tokens=4 * 4 * 48)
    refused(r"codec.draws: the store has 20, this run 30", targets={"codec": {"name": "sampled", "draws": 30}})
    changed = cached_run(tmp_path / "third", shared, **SHORT)
    teacher = tmp_path / "teacher"
    shutil.copytree(changed.teacher, teacher)
    data = bytearray((teacher / "model.safetensors").read_bytes())
    data[-1] ^= 1
    (teacher / "model.safetensors").write_bytes(data)
    from dataclasses import replace

    with pytest.raises(
        ConfigError, match=r"the teacher's weights\.model.*: the store has [0-9a-f]+, this run [0-9a-f]+"
    ):
        write_targets(replace(changed, teacher_folder=teacher))


def test_positions_of_the_highest_entropy_alone_are_trained_on(
    cached_run: CachedRun, distil: Distil, tmp_path: Path
) -> None:
    """Every figure of a step is a mean over them; held-out sequences keep all positions."""
    settings = {**STORED, "positions": "entropy", "share": 0.25}
    context = cached_run(tmp_path / "run", settings, **SHORT)
    write_targets(context)
    reader = StoreReader(tmp_path / "run" / "targets")
    loader = PackedLoader(TokenStore.open(context.run.data).split("train"), 48, 4, 1, context.config.seed)
    for number in range(8):
        labelled = int((loader.stack([number]).labels_BS != -100).sum())
        assert int(reader.sequence("train", number).kept_S.sum()) == -(-labelled // 4)
    rows = distil(tmp_path / "run", targets=settings, teacher_placement="cached", **SHORT)
    online_rows = distil(tmp_path / "online", **SHORT)
    assert rows[0]["loss"] == online_rows[0]["loss"]  # of the first validation
    trained = [row for row in rows if row["kind"] == "train"]
    kept = sum(int(reader.sequence("train", number).kept_S.sum()) for number in range(4))
    assert trained[0]["labels"] == kept
    assert trained[0]["ce"] > online_rows[1]["ce"]  # the harder ones


def test_ranks_that_share_sequences_read_their_own_labels(cached_run: CachedRun, tmp_path: Path) -> None:
    context = cached_run(tmp_path / "run", STORED, **SHORT)
    write_targets(context)
    store = StoreReader(tmp_path / "run" / "targets")
    loader = PackedLoader(TokenStore.open(context.run.data).split("train"), 48, 4, 4, context.config.seed)
    batch, cpu = loader.step(1)[0], torch.device("cpu")
    whole = read_rows(store, to_device(batch, cpu))
    positions = [to_device(batch.with_label_slice(number, 3), cpu) for number in range(3)]
    order = torch.cat([slice_.rows_N for slice_ in positions]).argsort()
    for name, values in whole.items():
        assert torch.equal(torch.cat([read_rows(store, slice_)[name] for slice_ in positions])[order], values)
    other = PackedLoader(TokenStore.open(context.run.data).split("train"), 48, 4, 4, seed=6).step(1)[0]
    with pytest.raises(DataError, match=r"train sequence 4\n.*the tokens that its targets are of"):
        read_rows(store, to_device(other, cpu))
