"""Any partition of the parameters can be read back as any other."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from kdscale.distill.checkpoint.rank_files import (
    QUANTITIES,
    RankFileIndex,
    RankFileReader,
    WriteCancelled,
    cut_evenly,
    write_rank_file,
)
from kdscale.errors import CheckpointError
from kdscale.models.parameter_map import ParameterRange

SHAPES = st.lists(st.lists(st.integers(0, 7), max_size=3), min_size=1, max_size=5).map(
    lambda shapes: {f"layer.{i}:weight": tuple(shape) for i, shape in enumerate(shapes)}
)


@st.composite
def partitions(draw, shapes):
    """Ranges by rank: every parameter is cut at drawn places, and every range given to a drawn rank."""
    ranks = [[] for _ in range(draw(st.integers(1, 4)))]
    for name, shape in shapes.items():
        size = math.prod(shape)
        cuts = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=3))})
        for begin, end in itertools.pairwise(cuts):
            draw(st.sampled_from(ranks)).append(ParameterRange(name, begin, end - begin))
    return ranks


@st.composite
def cases(draw):
    shapes = draw(SHAPES)
    return shapes, draw(partitions(shapes)), draw(partitions(shapes))


def values_of(shapes):
    generator = torch.Generator().manual_seed(0)
    return {
        (quantity, name): torch.rand(math.prod(shape), generator=generator)
        for quantity in QUANTITIES
        for name, shape in shapes.items()
    }


def write_all(folder, values, ranks):
    paths = []
    for number, held in enumerate(ranks):
        if held:
            blocks = (values[quantity, p.name][p.offset : p.offset + p.length] for quantity in QUANTITIES for p in held)
            paths.append(folder / f"rank-{number}.safetensors")
            write_rank_file(paths[-1], held, blocks)
    return paths


@settings(max_examples=60, deadline=None)
@given(cases())
def test_any_partition_reads_back_as_any_other(tmp_path_factory, case):
    shapes, old, new = case
    folder = tmp_path_factory.mktemp("ranges")
    values = values_of(shapes)
    index = RankFileIndex(write_all(folder, values, old), shapes)
    got = {key: torch.full_like(value, torch.nan) for key, value in values.items()}
    with RankFileReader(index) as reader:
        for held in new:
            for span in held:
                for quantity in QUANTITIES:
                    reader.fill(quantity, span, got[quantity, span.name][span.offset : span.offset + span.length])
    assert all(torch.equal(got[key], values[key]) for key in values)


@given(cases(), st.integers(1, 5))
def test_stretches_are_near_equal_and_make_up_all_ranges(case, count):
    held = [span for rank in case[1] for span in rank]
    stretches = [cut_evenly(held, index, count) for index in range(count)]
    sizes = [sum(span.length for span in stretch) for stretch in stretches]
    assert max(sizes) - min(sizes) <= 1

    def elements(ranges):
        return [(p.name, p.offset + i) for p in ranges for i in range(p.length)]

    assert elements([span for stretch in stretches for span in stretch]) == elements(held)


def test_only_the_bytes_of_a_range_are_read(tmp_path):
    shapes = {"w": (100,)}
    paths = write_all(tmp_path, values_of(shapes), [[ParameterRange("w", 0, 40)], [ParameterRange("w", 40, 60)]])
    reads = RankFileIndex(paths, shapes).plan("exp_avg", ParameterRange("w", 30, 25))
    assert [(read.file.name, read.target, read.length) for read in reads] == [
        ("rank-0.safetensors", 0, 10), ("rank-1.safetensors", 10, 15),
    ]  # fmt: skip


def test_any_reader_of_safetensors_can_use_it(tmp_path):
    values = values_of({"w": (6,)})
    (path,) = write_all(tmp_path, values, [[ParameterRange("w", 0, 4), ParameterRange("w", 4, 2)]])
    loaded = load_file(path)
    assert sorted(loaded) == sorted(f"{quantity}:{offset}:w" for quantity in QUANTITIES for offset in (0, 4))
    assert torch.equal(loaded["exp_avg_sq:4:w"], values["exp_avg_sq", "w"][4:])


def test_masters_come_before_the_moments(tmp_path):
    facts = write_rank_file(tmp_path / "f", [ParameterRange("w", 0, 4)], [torch.full((4,), float(i)) for i in range(3)])
    tail = (tmp_path / "f").read_bytes()[facts.weights_bytes - 16 :]
    assert torch.frombuffer(bytearray(tail), dtype=torch.float32).tolist() == [0.0] * 4 + [1.0] * 4 + [2.0] * 4


@pytest.mark.parametrize(
    ("ranks", "said"),
    [
        ([[ParameterRange("w", 0, 4)]], "each once"),
        ([[ParameterRange("w", 0, 4)], [ParameterRange("w", 5, 1)]], "each once"),
        ([[ParameterRange("w", 0, 4)], [ParameterRange("w", 3, 3)]], "each once"),
        ([[ParameterRange("w", 0, 6)], [ParameterRange("v", 0, 2)]], "ranges of the student's parameters"),
    ],
    ids=["short", "hole", "overlap", "foreign"],
)
def test_files_that_do_not_make_up_the_parameters_are_refused(tmp_path, ranks, said):
    values = values_of({"w": (6,), "v": (2,)})
    paths = write_all(tmp_path, values, ranks)
    with pytest.raises(CheckpointError, match=said):
        RankFileIndex(paths, {"w": (6,)})


def test_other_tensors_are_refused(tmp_path):
    save_file({"master:0:w": torch.zeros(2, 3)}, tmp_path / "f")
    with pytest.raises(CheckpointError, match="flat F32"):
        RankFileIndex([tmp_path / "f"], {"w": (6,)})


def test_a_file_that_shrinks_or_goes_is_named(tmp_path):
    shapes = {"w": (6,)}
    (path,) = write_all(tmp_path, values_of(shapes), [[ParameterRange("w", 0, 6)]])
    index, out = RankFileIndex([path], shapes), torch.zeros(6)
    path.write_bytes(path.read_bytes()[:-4])
    with RankFileReader(index) as reader, pytest.raises(CheckpointError, match="4 bytes too few"):
        reader.fill("exp_avg_sq", ParameterRange("w", 0, 6), out)
    path.unlink()
    with RankFileReader(index) as reader, pytest.raises(CheckpointError, match="is gone"):
        reader.fill("master", ParameterRange("w", 0, 6), out)
    with RankFileReader(index) as reader, pytest.raises(CheckpointError, match="at least 7 values"):
        reader.fill("master", ParameterRange("w", 1, 6), out)


def test_a_write_can_be_cancelled(tmp_path):
    answers = iter([False, True])
    with pytest.raises(WriteCancelled):
        write_rank_file(tmp_path / "f", [ParameterRange("w", 0, 4)], [torch.zeros(4)] * 3, lambda: next(answers))
