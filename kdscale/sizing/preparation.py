"""How long a job's GPUs wait while one node tokenises, measures and prunes. Rough on purpose: an order of magnitude.

Letters: U ffn, the widest input of a regression.
"""

from __future__ import annotations

from dataclasses import dataclass

from kdscale.sizing.model_shape import ModelShape

# Measured (docs/LOG.md): tokens a second of one core. The other three are assumed: cores of a GPU node, bytes a second
# of its storage, FLOP/s of one GPU in fp32 statistics and bf16 passes together.
_TOKENS_PER_CORE, _CORES, _DISK, _FLOPS = 360e3, 32, 1e9, 50e12
_READS = 4  # of the teacher: importance, masked runs, compensation, the weights that are copied
_PASSES = 8  # over the calibration tokens: importance, and two sublayers of both models fitted and run


@dataclass(frozen=True)
class Preparation:
    """Seconds of what one node does before the ranks meet."""

    text: float
    pruning: float

    @property
    def seconds(self) -> float:
        """Of all of it."""
        return self.text + self.pruning


def estimate_preparation(
    teacher: ModelShape, *, text_tokens: float, calibration_tokens: float, probe_tokens: float, gpus: int
) -> Preparation:
    """Of a run that tokenises `text_tokens` (0: it is done) and prunes `teacher` on `gpus` GPUs of a node.

    `probe_tokens` are those of all probes together, each a step of training a model of the teacher's size.
    """
    passes = _PASSES * 2.0 * teacher.products * calibration_tokens
    sums = 4.0 * teacher.layers * calibration_tokens * float(teacher.ffn) ** 2  # X'X of both streams, [U, U]
    probes = 8.0 * teacher.products * probe_tokens
    disk = 2.0 * (_READS + 1) * teacher.params / _DISK  # 16-bit weights
    return Preparation(
        text=text_tokens / (_TOKENS_PER_CORE * _CORES), pruning=disk + (passes + sums + probes) / (_FLOPS * gpus)
    )
