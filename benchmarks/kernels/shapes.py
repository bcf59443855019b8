"""The tables of shapes: N rows (tokens), H hidden size, V vocabulary, K teacher entries a row."""

from __future__ import annotations

from typing import NamedTuple

# "cpu": the first is the comparison the project is held to; then a large vocabulary and a wide small-vocabulary head.
# "gpu": the reference point, half its rows (published peer figures), then vocabularies and widths of common families.
TABLES: dict[str, list[tuple[int, int, int, int]]] = {
    "cpu": [(2048, 576, 49152, 64), (512, 896, 151936, 64), (1024, 2048, 32000, 64)],
    "official": [(2048, 576, 49152, 64)],
    "gpu": [
        (16384, 4096, 128256, 64),
        (8192, 4096, 128256, 64),
        (16384, 4096, 131072, 64),
        (16384, 3584, 151936, 64),
        (8192, 2304, 256000, 64),
        (16384, 4096, 128256, 256),
        (16384, 2048, 32000, 64),
    ],
    "tiny": [(24, 16, 256, 8)],
}


class LossShape(NamedTuple):
    """One shape of a loss."""

    n: int
    h: int
    v: int
    k: int

    def __str__(self) -> str:
        return f"N={self.n} H={self.h} V={self.v} K={self.k}"
