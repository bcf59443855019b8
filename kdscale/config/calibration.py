"""What sections have in common whose work runs calibration text through a model, shared by ranks of one machine."""

from __future__ import annotations

from pydantic import model_validator

from kdscale.config.fields import Count, Dtype, Few, Length, Section


class CalibrationSection(Section):
    """On how much training text, and how it is computed."""

    calibration_tokens: Count
    seq_len: Length = 512
    micro_batch: Few = 4
    dtype: Dtype = "auto"
    # ranks on this machine that share the calibration sequences; None: one a GPU, one on a CPU
    processes: Few | None = None

    @model_validator(mode="after")
    def _every_rank_gets_a_batch(self) -> CalibrationSection:
        if self.calibration_tokens < self.seq_len:
            raise ValueError(
                f"calibration_tokens ({self.calibration_tokens}) must be at least seq_len ({self.seq_len})"
            )
        if self.processes is not None and self.processes > self.most_processes:
            raise ValueError(
                f"processes ({self.processes}) must be at most the calibration batches ({self.most_processes}): raise "
                "calibration_tokens or lower micro_batch"
            )
        return self

    @property
    def most_processes(self) -> int:
        """The calibration batches: every rank gets at least one."""
        return -(-self.calibration_tokens // (self.seq_len * self.micro_batch))
