"""Exit codes, and errors that only a code tells of."""

from __future__ import annotations

import subprocess
import sys
from importlib import metadata

import pytest

import kdscale
from kdscale import errors
from kdscale.runtime.exits import FINAL_CODES
from kdscale.runtime.versions import versions


def test_every_error_has_a_code_of_its_own_and_is_no_value_error() -> None:
    kinds = [item for item in vars(errors).values() if isinstance(item, type) and issubclass(item, errors.KdscaleError)]
    named = [kind for kind in kinds if kind is not errors.KdscaleError]
    assert {kind.exit_code: kind for kind in named} == errors.ERRORS_BY_CODE
    assert len(named) == len(errors.ERRORS_BY_CODE)
    assert not any(issubclass(kind, ValueError) for kind in kinds)


def test_a_launcher_tries_again_what_may_work_again() -> None:
    retried = {kind for code, kind in errors.ERRORS_BY_CODE.items() if code not in FINAL_CODES}
    assert retried == {errors.LostRankError, errors.HungRankError, errors.MachineError}


@pytest.mark.parametrize("group", [False, True])
def test_leaving_flushes_and_keeps_the_code(group: bool) -> None:
    join = "import torch.distributed as d; d.init_process_group('gloo', store=d.HashStore(), rank=0, world_size=1); "
    code = "import atexit; atexit.register(print, 'destructors'); from kdscale.runtime.exits import leave; "
    code += (join if group else "") + "print('said', end=''); leave(5)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 5
    assert done.stdout == ("said" if group else "saiddestructors\n")


@pytest.mark.parametrize("error", [metadata.PackageNotFoundError("x"), KeyError("Version"), OSError("gone")])
def test_versions_never_raise(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(name: str) -> str:
        raise error

    monkeypatch.setattr(metadata, "version", fail)
    assert versions()["torch"] == "unknown"
    assert versions()["kdscale"] == kdscale.__version__
