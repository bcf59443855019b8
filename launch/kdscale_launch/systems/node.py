"""`python -m kdscale_launch.systems.node ... -- COMMAND`: start the ranks of one node of a larger job.

For pods, or by hand on each host. Ends with the ranks' error, and with 75 when they were stopped and saved.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from kdscale_launch.job import STOPPED_EXIT_CODE, JobSpec, LaunchError, RankFailed, RankPlace
from kdscale_launch.local import run_local


def main(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="kdscale_launch.systems.node", description="Run one node's ranks of a larger job."
    )
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True, help="ranks on every node")
    parser.add_argument(
        "--node-rank-from", required=True, metavar="VARIABLE", help="which variable holds the node's rank"
    )
    parser.add_argument("--master-addr", default=os.environ.get("MASTER_ADDR"))
    parser.add_argument("--master-port", type=int, default=os.environ.get("MASTER_PORT"))
    parser.add_argument("--log-dir", type=Path, required=True)
    parser.add_argument("--grace", type=float, default=60.0)
    parser.add_argument("command", nargs="+")
    given = parser.parse_args(arguments)
    node = os.environ.get(given.node_rank_from, "")
    if not node.isdigit() or int(node) >= given.nodes:
        parser.error(f"{given.node_rank_from} must hold this node's rank, 0 to {given.nodes - 1}; got {node!r}")
    if not given.master_addr or not given.master_port:
        parser.error("--master-addr and --master-port, or MASTER_ADDR and MASTER_PORT, say where rank 0 is")
    place = RankPlace(int(node) * given.slots, given.nodes * given.slots, given.master_addr, given.master_port)
    spec = JobSpec(tuple(given.command), given.slots, given.log_dir, grace_seconds=given.grace, place=place)
    try:
        code = run_local(spec)
    except RankFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code if error.exit_code > 0 else 128 - error.exit_code
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return STOPPED_EXIT_CODE if code == 128 + signal.SIGTERM else code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
