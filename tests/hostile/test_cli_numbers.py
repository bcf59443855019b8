"""Every option of the command line that takes a number has a finite range, and refuses what is outside it."""

from __future__ import annotations

import math
from typing import Any, get_args

import pytest
import typer

from kdscale.cli.main import make_app

NASTY = ("nan", "inf", "-inf", "1e400", "1" + "0" * 30, "-1", "0x10", "ten", "", " ", "1,5", "٣e", "\x1b[31m")


def number_options() -> list[tuple[str, Any, Any]]:
    """(command and option, its command, the option)."""
    group: Any = typer.main.get_command(make_app())
    found = []
    for name, command in group.commands.items():
        for option in command.params:
            annotation = getattr(getattr(option, "type_descriptor", None), "annotation", None)
            kinds = {annotation, *get_args(annotation)}
            if kinds & {int, float} and not getattr(option, "is_flag", False):
                found.append((f"{name} {option.opts[0]}", command, option))
    return found


OPTIONS = number_options()


def test_there_are_such_options() -> None:
    assert len(OPTIONS) > 20


@pytest.mark.parametrize(("name", "command", "option"), OPTIONS, ids=[name for name, *_ in OPTIONS])
def test_a_number_is_refused_or_within_its_range(name: str, command: Any, option: Any) -> None:
    assert option.min is not None and option.max is not None
    assert math.isfinite(option.min) and math.isfinite(option.max)
    beyond = (str(option.min - 1), str(option.max * 2 + 1))
    for text in (*NASTY, *beyond):
        code = _parse(command, option, text)
        assert code == "refused" or option.min <= code <= option.max, (name, text, code)
        assert text not in beyond or code == "refused"


def _parse(command: Any, option: Any, text: str) -> Any:
    """The value that the option makes of a text, or that it refuses it, as a usage error."""
    context = command.context_class(command)
    try:
        value = option.process_value(context, [text] if option.multiple else text)
    except typer.BadParameter:
        return "refused"
    return value[0] if option.multiple else value
