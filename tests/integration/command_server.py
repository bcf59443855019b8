"""The command line in forks of one process that has imported everything: no torch import for each command.

It reads a line of JSON for each command: {"arguments", "folder", "out", "err", "may_be_heavy"}; `out` and `err` are the
files for what the command prints. It answers with a line that has the exit code, and ends when its input does. With
`light` it has imported the command line alone.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import traceback
from typing import Any

from kdscale.cli.main import main

MOST_SECONDS = 280
HEAVY = frozenset({"torch", "transformers", "deepspeed", "matplotlib"})
LIGHT = sys.argv[1:] == ["light"]
if not LIGHT:
    import torch
    import transformers.models.llama.modeling_llama  # noqa: F401 - imported once, before the forks

    import kdscale.models.loading  # noqa: F401


def run(job: dict[str, Any]) -> None:
    """In a fork: be the command that `job` asks for."""
    signal.alarm(MOST_SECONDS)  # ends what hangs
    streams = [os.open(os.devnull, os.O_RDONLY), *(os.open(job[name], os.O_WRONLY) for name in ("out", "err"))]
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
    os.chdir(job["folder"])
    sys.argv = ["kdscale", *job["arguments"]]
    if not LIGHT:
        torch.set_num_threads(1)  # makes torch's thread pool anew in the fork
    main()


def code_of(job: dict[str, Any]) -> int:
    code = 1
    try:
        run(job)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:  # noqa: BLE001 - a fork must not go on as its parent
        traceback.print_exc()
    if not job["may_be_heavy"] and (heavy := HEAVY & sys.modules.keys()):
        print(f"loaded: {', '.join(heavy)}", file=sys.stderr)
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    return code


if __name__ == "__main__":
    gc.freeze()  # or each fork looks through all that was imported, and so copies its pages
    for line in sys.stdin:
        child = os.fork()
        if not child:
            os._exit(code_of(json.loads(line)))
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
