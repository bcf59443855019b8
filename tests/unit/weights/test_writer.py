"""Writing checkpoints: what is read back is what was written, whole or not at all."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file

from kdscale.errors import RunFolderError, SelfCheckError
from kdscale.weights import Checkpoint, ShardWriter, TensorInfo
from kdscale.weights.writer import plan_shards

_TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_BYTES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2}
_SLOW_OK = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))

specs_of = st.dictionaries(
    st.text(st.characters(codec="utf-8", exclude_categories=["Cs"]), min_size=1, max_size=12).filter(
        lambda name: name != "__metadata__"
    ),
    st.builds(
        TensorInfo,
        st.lists(st.integers(0, 5), max_size=3).map(tuple),
        st.sampled_from(sorted(_TORCH)),
    ),
    min_size=1,
    max_size=12,
)


def _random(spec: TensorInfo, seed: int) -> torch.Tensor:
    """Any bit pattern at all: NaN payloads and infinities have to survive too."""
    count = _BYTES[spec.dtype] * int(torch.tensor(spec.shape).prod()) if spec.shape else _BYTES[spec.dtype]
    raw = torch.randint(0, 256, (count,), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))
    return raw.view(_TORCH[spec.dtype]).reshape(spec.shape)


def _bits(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _write(folder: Path, specs: dict[str, TensorInfo], order: list[str], limit: int) -> dict[str, torch.Tensor]:
    names = list(specs)
    tensors = {name: _random(specs[name], names.index(name)) for name in names}
    with ShardWriter(folder, specs, limit) as writer:
        for name in order:
            writer.add(name, tensors[name])
    (folder / "config.json").write_text("{}")
    return tensors


@_SLOW_OK
@given(specs=specs_of, limit=st.integers(1, 400), data=st.data())
def test_what_is_read_is_what_was_written(
    tmp_path_factory: pytest.TempPathFactory, specs: dict[str, TensorInfo], limit: int, data: st.DataObject
) -> None:
    """Any shapes, dtypes, shard size and order of arrival; the safetensors library agrees, and bytes repeat."""
    folder, again = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    tensors = _write(folder, specs, list(specs), limit)
    checkpoint = Checkpoint.open(folder)
    assert sorted(checkpoint.names) == sorted(specs)
    seen: set[str] = set()
    for file in checkpoint.files:
        with safe_open(file, framework="pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            names = set(opened.keys())
            assert not names & seen
            seen |= names
            for name in names:
                assert _bits(opened.get_tensor(name)) == _bits(tensors[name])
    assert seen == set(specs)
    for name, spec in specs.items():
        assert checkpoint.spec(name) == spec
        got = checkpoint.tensor(name)
        assert (got.dtype, tuple(got.shape)) == (_TORCH[spec.dtype], spec.shape)
        assert _bits(got) == _bits(tensors[name])
    _write(again, specs, data.draw(st.permutations(list(specs))), limit)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {p.name: p.read_bytes() for p in again.iterdir()}


@_SLOW_OK
@given(specs=specs_of, limit=st.integers(1, 400))
def test_shards_cover_every_tensor_once_and_keep_to_the_limit(specs: dict[str, TensorInfo], limit: int) -> None:
    shards = plan_shards(specs, limit)
    assert [name for shard in shards for name in specs if name in shard.offsets] == list(specs)
    assert sum(len(shard.offsets) for shard in shards) == len(specs)
    for shard in shards:
        sizes = [_random(specs[name], 0).nbytes for name in shard.offsets]
        assert sum(sizes) <= limit or len([size for size in sizes if size]) == 1
        assert shard.size == len(shard.header) + sum(sizes)
        assert all(at % _BYTES[specs[name].dtype] == 0 for name, at in shard.offsets.items())


_TWO = {"a": TensorInfo((2, 3), "F32"), "b": TensorInfo((4,), "BF16")}


def test_names_and_index_follow_the_standard_layout(tmp_path: Path) -> None:
    tensors = _write(tmp_path, _TWO, ["b", "a"], 24)
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "config.json",
        "model-00001-of-00002.safetensors",
        "model-00002-of-00002.safetensors",
        "model.safetensors.index.json",
    ]
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 32},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    # a second write with one shard leaves nothing of the first behind
    _write(tmp_path, _TWO, ["a", "b"], 1000)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert _bits(load_file(tmp_path / "model.safetensors")["b"]) == _bits(tensors["b"])


def test_transformers_reads_what_we_write(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    teacher = Checkpoint.open(tiny_llama_dir)
    with ShardWriter(tmp_path, {name: teacher.spec(name) for name in teacher.names}, 200_000) as writer:
        for name in teacher.names:
            writer.add(name, teacher.tensor(name))
    assert len(writer.files) > 2
    (tmp_path / "config.json").write_text((tiny_llama_dir / "config.json").read_text())
    one, two = (AutoModelForCausalLM.from_pretrained(path).state_dict() for path in (tiny_llama_dir, tmp_path))
    assert set(one) == set(two)
    assert all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize(
    ("name", "tensor", "message"),
    [
        ("c", torch.zeros(2), "not announced"),
        ("a", torch.zeros(3, 2), r"expected: TensorInfo\(shape=\(2, 3\)"),
        ("a", torch.zeros(2, 3, dtype=torch.float16), "F16"),
        ("b", torch.zeros(4, dtype=torch.int8), r"torch\.int8"),
    ],
)
def test_tensors_that_were_not_announced_are_refused(
    tmp_path: Path, name: str, tensor: torch.Tensor, message: str
) -> None:
    with pytest.raises(SelfCheckError, match=message), ShardWriter(tmp_path, _TWO) as writer:
        writer.add(name, tensor)
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_left_when_a_tensor_is_missing_or_comes_twice(tmp_path: Path) -> None:
    with pytest.raises(SelfCheckError, match="first that is missing is b"), ShardWriter(tmp_path, _TWO) as writer:
        writer.add("a", torch.zeros(2, 3))
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SelfCheckError, match="second tensor"), ShardWriter(tmp_path, _TWO) as writer:
        writer.add("a", torch.zeros(2, 3))
        writer.add("a", torch.zeros(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_exception_in_the_block_leaves_no_files_and_keeps_the_old_ones(tmp_path: Path) -> None:
    _write(tmp_path, _TWO, ["a", "b"], 1000)
    before = (tmp_path / "model.safetensors").read_bytes()
    with pytest.raises(RuntimeError, match="stop"), ShardWriter(tmp_path, _TWO, 8) as writer:
        writer.add("a", torch.zeros(2, 3))
        raise RuntimeError("stop")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_views_that_are_not_contiguous_are_written_by_value(tmp_path: Path) -> None:
    whole = torch.arange(12.0).reshape(4, 3)
    with ShardWriter(tmp_path, {"a": TensorInfo((3, 2), "F32")}) as writer:
        writer.add("a", whole.t()[:, 1:3])
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], whole.t()[:, 1:3])


def test_disk_without_room_is_found_before_any_work(tmp_path: Path) -> None:
    with pytest.raises(RunFolderError, match="no room for the weights"):
        ShardWriter(tmp_path, {"a": TensorInfo((1 << 58,), "F32")})
    assert list(tmp_path.iterdir()) == []


def test_disk_that_fills_up_meanwhile_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real_open: Callable[..., Any] = Path.open

    class Full:
        def __init__(self, stream: Any):
            self.stream = stream

        def __enter__(self) -> Full:
            return self

        def __exit__(self, *_: object) -> None:
            self.stream.close()

        def seek(self, at: int) -> None:
            self.stream.seek(at)

        def write(self, _: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    def full_open(path: Path, mode: str = "r", **kwargs: Any) -> Any:
        stream = real_open(path, mode, **kwargs)
        return Full(stream) if mode == "r+b" else stream

    monkeypatch.setattr(Path, "open", full_open)
    with pytest.raises(RunFolderError, match="disk is full"), ShardWriter(tmp_path, _TWO) as writer:
        writer.add("a", torch.zeros(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_bad_plans_are_refused() -> None:
    with pytest.raises(ValueError, match="positive max_shard_bytes"):
        plan_shards(_TWO, 0)
    with pytest.raises(ValueError, match="need tensors"):
        plan_shards({}, 10)
    with pytest.raises(ValueError, match="dtype 'I8'"):
        plan_shards({"a": TensorInfo((2,), "I8")}, 10)


BLOCK_SPECS = {"a": TensorInfo((7, 3), "BF16"), "b": TensorInfo((5,), "F32"), "c": TensorInfo((2, 2, 2), "F16")}


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
def test_blocks_of_rows_give_the_bytes_of_the_whole(tmp_path: Path, rows: int) -> None:
    whole = _write(tmp_path / "whole", BLOCK_SPECS, list(BLOCK_SPECS), 60)
    source = Checkpoint.open(tmp_path / "whole")
    with ShardWriter(tmp_path / "blocks", BLOCK_SPECS, 60) as writer:
        for name, tensor in whole.items():
            row_bytes = tensor.nbytes // len(tensor)
            blocks = list(source.blocks(name, rows * row_bytes))
            assert max(map(len, blocks)) == min(rows, len(tensor))
            writer.add_blocks(name, blocks)
    for file in source.files:
        assert (tmp_path / "blocks" / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize(
    "blocks",
    [
        [],
        [torch.zeros(6, 3, dtype=torch.bfloat16)],
        [torch.zeros(4, 3, dtype=torch.bfloat16)] * 2,
        [torch.zeros(7, 2, dtype=torch.bfloat16)],
        [torch.zeros(6, 3, dtype=torch.bfloat16), torch.zeros(1, 3)],
    ],
)
def test_blocks_that_are_not_what_was_announced(tmp_path: Path, blocks: list[torch.Tensor]) -> None:
    with pytest.raises(SelfCheckError, match="cannot write a"), ShardWriter(tmp_path / "x", BLOCK_SPECS) as writer:
        writer.add_blocks("a", blocks)


def test_positions_are_in_file_order(tmp_path: Path) -> None:
    _write(tmp_path / "x", BLOCK_SPECS, list(BLOCK_SPECS), 30)
    source = Checkpoint.open(tmp_path / "x")
    assert [source.position(name)[0] for name in BLOCK_SPECS] == [0, 1, 2]
    _write(tmp_path / "y", BLOCK_SPECS, list(BLOCK_SPECS), 500)
    one = Checkpoint.open(tmp_path / "y")
    assert sorted(BLOCK_SPECS, key=one.position) == ["b", "a", "c"]  # wide dtypes first


class _Stop(BaseException):
    pass


@pytest.mark.parametrize("limit", [50, 500])
@pytest.mark.parametrize("when", ["before a commit", "after a commit", "after closing"])
def test_a_journal_lets_another_writer_go_on(tmp_path: Path, limit: int, when: str) -> None:
    whole = _write(tmp_path / "whole", BLOCK_SPECS, list(BLOCK_SPECS), limit)
    (tmp_path / "whole" / "config.json").unlink()
    folder, journal = tmp_path / "parts", tmp_path / "journal.json"

    def writer() -> ShardWriter:
        return ShardWriter(folder, BLOCK_SPECS, limit, journal=journal)

    with pytest.raises(_Stop), writer() as first:
        first.add("a", whole["a"])
        first.commit()
        first.add("b", whole["b"])
        if when != "before a commit":
            first.commit()
        if when == "after closing":
            first.add("c", whole["c"])
            first.commit()
            first.close()
        raise _Stop
    with writer() as second:
        done = {"before a commit": {"a"}, "after a commit": {"a", "b"}, "after closing": {"a", "b", "c"}}[when]
        assert second.written == done
        with pytest.raises(SelfCheckError, match="the second tensor"):
            second.add("a", whole["a"])
        for name in BLOCK_SPECS.keys() - done:
            second.add(name, whole[name])
    found = {item.name: item.read_bytes() for item in folder.iterdir()}
    assert found == {item.name: item.read_bytes() for item in (tmp_path / "whole").iterdir()}


def test_a_journal_of_another_layout_or_without_its_files_counts_for_nothing(tmp_path: Path) -> None:
    whole = _write(tmp_path / "whole", BLOCK_SPECS, list(BLOCK_SPECS), 500)
    folder, journal = tmp_path / "parts", tmp_path / "journal.json"

    def one_tensor() -> None:
        with pytest.raises(_Stop), ShardWriter(folder, BLOCK_SPECS, 500, journal=journal) as writer:
            writer.add("a", whole["a"])
            writer.commit()
            raise _Stop

    one_tensor()
    other = {**BLOCK_SPECS, "b": TensorInfo((5,), "F16")}
    assert ShardWriter(folder, other, 500, journal=journal).written == set()
    one_tensor()
    for item in folder.iterdir():
        item.unlink()
    assert ShardWriter(folder, BLOCK_SPECS, 500, journal=journal).written == set()
