"""How long ranks may stand still: by device unless given, and collectives always longer than any watchdog."""

from __future__ import annotations

import pytest

from kdscale.config.load import build_config
from kdscale.runtime.timeouts import group_timeout, watchdog_seconds
from kdscale_launch.watchdog import SLOW_FACTOR


@pytest.mark.parametrize(("given", "seconds"), [(None, 1800.0), (12.5, 12.5), (0, 0.0)])
def test_watchdog_and_collectives(given, seconds):
    tree = {
        "name": "t", "run_dir": "unused", "teacher": {"path": "none"}, "prune": {"target_params": "50%"},
        "distill": {"watchdog_seconds": given}, "runtime": {"device": "cpu"},
    }  # fmt: skip
    config = build_config(tree, "test")
    assert watchdog_seconds(config) == seconds
    timeout = group_timeout(config)
    if seconds:
        assert timeout is not None
        assert timeout.total_seconds() > SLOW_FACTOR * seconds
    else:
        assert timeout is None
    assert "watchdog_seconds" not in config.distill.decisive()  # another value goes on from the same checkpoint


def test_a_served_teachers_own_limit_comes_first():
    served = {"teacher_placement": "served", "served": {"urls": ["http://host:1"], "timeout": 4000.0}}
    tree = {
        "name": "t", "run_dir": "unused", "teacher": {"path": "none"}, "prune": {"target_params": "50%"},
        "distill": served, "runtime": {"device": "cpu"},
    }  # fmt: skip
    assert watchdog_seconds(build_config(tree, "test")) > 4000.0
