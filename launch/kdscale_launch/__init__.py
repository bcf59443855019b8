"""Start the ranks of a job and see to it that all of them end. Standard library only."""

from kdscale_launch.job import JobSpec, LaunchError, RankFailed
from kdscale_launch.local import run_local

__all__ = ["JobSpec", "LaunchError", "RankFailed", "run_local"]
