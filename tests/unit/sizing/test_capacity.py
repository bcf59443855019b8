"""The warning about a student that is far smaller than its teacher."""

from __future__ import annotations

from kdscale.sizing.capacity import Capacity


def test_the_capacity_gap_is_computed_from_sizes_and_tokens():
    assert Capacity(8_000_000_000, 4_500_000_000, 10**6).warnings() == []
    (few,) = Capacity(8_000_000_000, 2_000_000_000, 2_000_000_000).warnings()
    assert "4.0 times" in few
    assert "2311.07052" in few
    assert "1 per parameter" in few
    assert "too few" in few
    assert "3.2B" in few
    (many,) = Capacity(8_000_000_000, 2_000_000_000, 94_000_000_000).warnings()
    assert "narrows the gap" in many
