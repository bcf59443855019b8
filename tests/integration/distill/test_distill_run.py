from __future__ import annotations


def test_loss_falls(distil, tmp_path):
    rows = distil(tmp_path)
    print(rows)
