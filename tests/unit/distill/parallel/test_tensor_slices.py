"""Slices of parameters, however they were cut, read back as any other slices, or as the whole parameter."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdscale.distill.checkpoint.rank_files import QUANTITIES, RankFileIndex, RankFileReader, write_rank_file
from kdscale.distill.parallel.tensor_slices import TensorSlice, parse_slice_name
from kdscale.errors import CheckpointError
from kdscale.models.parameter_map import ParameterRange

NAME = "layer.weight"


@st.composite
def splits(draw, shape):
    """Ranges of the whole parameter, or of slices of it, that are all of it."""
    dim = draw(st.sampled_from([None, *range(len(shape))]))
    slices = [None]
    if dim is not None:
        inner = st.integers(1, shape[dim] - 1) if shape[dim] > 1 else st.nothing()
        cuts = sorted({0, shape[dim], *draw(st.lists(inner, max_size=2) if shape[dim] > 1 else st.just([]))})
        slices = [TensorSlice(dim, begin, end) for begin, end in itertools.pairwise(cuts)]
    ranges = []
    for tensor_slice in slices:
        size = math.prod(tensor_slice.shape(shape) if tensor_slice else shape)
        places = sorted({0, size, *draw(st.lists(st.integers(0, size), max_size=2))})
        name = tensor_slice.named(NAME) if tensor_slice else NAME
        ranges += [ParameterRange(name, begin, end - begin) for begin, end in itertools.pairwise(places)]
    return ranges


@st.composite
def cases(draw):
    shape = tuple(draw(st.lists(st.integers(1, 6), min_size=1, max_size=2)))
    return shape, draw(splits(shape)), draw(splits(shape))


def values_of(parameter, span):
    _, tensor_slice = parse_slice_name(span.name)
    kept = (
        parameter
        if tensor_slice is None
        else parameter.narrow(tensor_slice.dim, tensor_slice.begin, tensor_slice.end - tensor_slice.begin)
    )
    return kept.reshape(-1)[span.offset : span.offset + span.length]


def write(folder, parameters, ranges):
    blocks = [values_of(parameters[quantity], span).clone() for quantity in QUANTITIES for span in ranges]
    write_rank_file(folder / "f", ranges, blocks)
    return [folder / "f"]


@settings(max_examples=80, deadline=None)
@given(cases())
def test_any_slices_read_back_as_any_others(tmp_path_factory, case):
    shape, old, new = case
    parameters = {
        quantity: torch.rand(shape, generator=torch.Generator().manual_seed(i)) for i, quantity in enumerate(QUANTITIES)
    }
    index = RankFileIndex(write(tmp_path_factory.mktemp("slices"), parameters, old), {NAME: shape})
    with RankFileReader(index) as reader:
        for span, quantity in itertools.product(new, QUANTITIES):
            expected = values_of(parameters[quantity], span)
            for dtype in (torch.float32, torch.float64):  # straight into place, and by way of a block
                got = torch.full((span.length,), torch.nan, dtype=dtype)
                reader.fill(quantity, span, got)
                assert torch.equal(got.float(), expected)


@pytest.mark.parametrize(
    "slices",
    [
        [TensorSlice(0, 0, 2)],
        [TensorSlice(0, 0, 2), TensorSlice(0, 3, 4)],
        [TensorSlice(0, 0, 3), TensorSlice(0, 2, 4)],
        [TensorSlice(0, 0, 2), TensorSlice(1, 0, 3)],
        [TensorSlice(0, 0, 5)],
    ],
    ids=["short", "hole", "overlap", "both ways", "long"],
)
def test_slices_that_are_not_all_of_a_parameter_are_refused(tmp_path, slices):
    ranges = [
        ParameterRange(tensor_slice.named("w"), 0, math.prod(tensor_slice.shape((4, 3)))) for tensor_slice in slices
    ]
    blocks = [torch.zeros(span.length) for _ in QUANTITIES for span in ranges]
    write_rank_file(tmp_path / "f", ranges, blocks)
    with pytest.raises(CheckpointError, match=r"(?s)slices that make up all of \[4, 3\].*w@0:0:"):
        RankFileIndex([tmp_path / "f"], {"w": (4, 3)})


def test_a_slice_that_is_stored_is_read_in_one_go_and_columns_of_it_row_by_row(tmp_path):
    halves = [ParameterRange(TensorSlice(1, begin, begin + 2).named("w"), 0, 6) for begin in (0, 2)]
    blocks = [torch.zeros(6) for _ in QUANTITIES for _ in halves]
    write_rank_file(tmp_path / "f", halves, blocks)
    index = RankFileIndex([tmp_path / "f"], {"w": (3, 4)})
    assert len(index.plan("master", halves[1])) == 1
    assert [read.length for read in index.plan("master", ParameterRange("w@1:1:3", 0, 6))] == [1] * 6
