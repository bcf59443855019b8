"""The speed line, and the peak it is compared with."""

from __future__ import annotations

import torch

from kdscale.distill.telemetry.throughput import SpeedReport, peak_flops

CPU = torch.device("cpu")


def test_a_cpu_has_no_peak_of_its_own():
    assert peak_flops(None, CPU, torch.bfloat16) is None
    assert peak_flops(5e12, CPU, torch.float32) == 5e12


def test_the_speed_line_is_about_the_steps_since_the_last_one():
    report = SpeedReport()
    assert report.line("communication", 0.0) == ""
    report.add(1000, 2.0, {"teacher": 1.0, "backward": 0.5, "communication": 0.2}, 0.25)
    report.add(1000, 2.0, {"teacher": 1.0, "backward": 0.5, "communication": 0.2}, 0.75)
    line = report.line("communication", 3e9)
    assert line == (
        "500 tok/s · MFU 50.0 % · teacher 50 %, backward 25 % · communication 10 % (within these) · "
        "peak memory per rank 3.00 GB"
    )
    assert report.line("communication", 0.0) == ""
