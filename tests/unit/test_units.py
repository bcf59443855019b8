"""Counts, sizes and times as people write and read them."""

from __future__ import annotations

from typing import Any

import pytest

from kdscale import units


@pytest.mark.parametrize(
    ("write", "value", "text"),
    [
        (units.format_count, 999, "999"), (units.format_count, 999_499, "999 k"),
        (units.format_count, 999_500, "1.00 M"),
        (lambda value: units.format_count(value, 4), 134_515_008, "134.5 M"), (units.format_count, 94e9, "94.0 B"),
        (units.format_size, 999, "999 B"), (units.format_size, 5.04e9, "5.04 GB"),
        (units.format_number, 1_234_567, "1,234,567"), (units.format_number, 1_234_567.0, "1,234,567"),
        (units.format_number, 0.0, "0"), (units.format_number, 0.01234, "0.0123"),
        (units.format_duration, 59.94, "59.9 s"), (units.format_duration, 200, "3 min 20 s"),
        (units.format_duration, 7500, "2 h 05 min"),
        (units.compact_count, 94e9, "94B"), (units.compact_count, 2.046e9, "2.05B"),
        (units.compact_count, 999_999, "1M"),
        (units.compact_count, 512, "512"), (lambda value: units.compact_count(value, 4), 1_025_000, "1.025M"),
        (units.compact_size, 46_080, "46.1kB"), (units.compact_size, 12, "12B"),
        (units.compact_duration, 90, "90 s"), (units.compact_duration, 120, "2 min"),
        (units.compact_duration, 3 * 3600, "3 h"), (units.compact_duration, 12.4 * 86_400, "12 d"),
    ],
)  # fmt: skip
def test_numbers_are_written_for_people(write: Any, value: float, text: str) -> None:
    assert write(value) == text


def test_what_is_written_can_be_read_again() -> None:
    assert units.parse_count(units.compact_count(8e9)) == 8_000_000_000
    assert units.parse_budget("8GiB", "bytes") == ("absolute", 2.0**33)
    assert units.parse_count("4x") == "4x"  # left to pydantic to refuse


@pytest.mark.parametrize(
    ("rate", "unit", "text"),
    [
        (1234.5, "tok", "1,234 tok/s"), (3.21, "layer", "3.2 layer/s"), (0.24, "round", "4.2 s a round"),
        (0.004, "round", "4 min 10 s a round"), (1_234_567.0, "B", "1.23 MB/s"),
    ],
)  # fmt: skip
def test_rates_are_never_nothing_a_second(rate: float, unit: str, text: str) -> None:
    assert units.format_rate(rate, unit) == text
