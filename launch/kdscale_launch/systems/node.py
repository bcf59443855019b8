"""`python -m kdscale_launch.systems.node ... -- COMMAND`: start the ranks of one node of a larger job.

For pods, or by hand on each host, where no launcher reaches in. Leaves with the exit code of the first rank that
failed, and with 75 when the ranks were stopped with everything saved. With --notes it leaves that code in a file, and
leaves with 0 where such a file asked it to stop: job systems then do not start it again.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from kdscale_launch.job import (
    GRACE_SECONDS,
    STOPPED_EXIT_CODE,
    JobSpec,
    LaunchError,
    RankFailed,
    RankPlace,
    shell_exit_code,
)
from kdscale_launch.local import run_local
from kdscale_launch.systems import notes


def main(arguments: Sequence[str]) -> int:
    """Parse the arguments, run this node's ranks to their end, and return the exit code."""
    parser = argparse.ArgumentParser(
        prog="kdscale_launch.systems.node", description="Run one node's ranks of a larger job."
    )
    parser.add_argument("--nodes", type=int, required=True)
    parser.add_argument("--slots", type=int, required=True, help="ranks per node")
    parser.add_argument("--node-rank-from", required=True, metavar="VARIABLE", help="the variable with the node's rank")
    parser.add_argument("--master-addr", default=os.environ.get("MASTER_ADDR"))
    parser.add_argument("--master-port", type=int, default=os.environ.get("MASTER_PORT"))
    parser.add_argument("--log-dir", type=Path, required=True)
    parser.add_argument("--grace", type=float, default=GRACE_SECONDS)
    parser.add_argument("--notes", type=Path, metavar="FOLDER", help="see kdscale_launch.systems.notes")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args(arguments)
    node = os.environ.get(options.node_rank_from, "")
    if not node.isdigit() or int(node) >= options.nodes:
        parser.error(f"{options.node_rank_from} must hold this node's rank, 0 to {options.nodes - 1}; got {node!r}")
    if not options.master_addr or not options.master_port:
        parser.error("--master-addr and --master-port, or MASTER_ADDR and MASTER_PORT, say where rank 0 is")
    slots = options.slots
    place = RankPlace(int(node) * slots, options.nodes * slots, options.master_addr, options.master_port)
    spec = JobSpec(tuple(options.command), slots, options.log_dir, grace_seconds=options.grace, place=place)
    return _run(spec) if options.notes is None else _run_with_notes(spec, options.notes, int(node))


def _run_with_notes(spec: JobSpec, folder: Path, node: int) -> int:
    """See `main`: run unless somebody asked to stop, and write down how it ended."""
    notes.forget_exit_code(folder, node)
    if notes.is_asked_to_stop(folder):
        code = STOPPED_EXIT_CODE
    else:
        notes.watch_for_stop(folder)
        code = _run(spec)
    notes.leave_exit_code(folder, node, code)
    return 0 if code == STOPPED_EXIT_CODE and notes.is_asked_to_stop(folder) else code


def _run(spec: JobSpec) -> int:
    """Run this node's ranks; returns the exit code."""
    try:
        return run_local(spec)
    except RankFailed as error:
        print(f"error: {error}", file=sys.stderr)
        return shell_exit_code(error.exit_code)
    except LaunchError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
