"""`kdscale chat`: the models of a run answer side by side in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kdscale.cli.arguments import RunArgument, load, model_folder, model_folders, run_folder
from kdscale.errors import ConfigError, KdscaleError
from kdscale.escaping import for_terminal

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from rich.live import Live

    from kdscale.eval.chat import Answer, Chat
    from kdscale.eval.samples import Sampling

_NARROWEST_COLUMN = 30  # characters; below each other where the terminal is too narrow for columns
_HALF_A_CHARACTER = "\ufffd"  # what a tokenizer makes of the first bytes of one
_HELP = (
    "/reset · /models [names] · /temperature [number] · /tokens [number] · /quit (or Ctrl-D); Ctrl-C stops an answer"
)


def chat_command(
    run: RunArgument,
    models: Annotated[
        str | None, typer.Option(metavar="NAMES", help="E.g. teacher,distilled. Default: all that are there.")
    ] = None,
    prompt: Annotated[str | None, typer.Option(metavar="TEXT", help="Ask this one question, and leave.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, max=10**6, help="Most tokens of an answer.")] = 256,
    temperature: Annotated[
        float | None, typer.Option(min=0.0, max=100.0, help="0 is greedy. Default: eval.sample_temperature.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=2**31, help="Of the draws, the same for all models.")] = 0,
) -> None:
    """Talk to teacher, pruned and distilled student of RUN side by side."""
    from rich.console import Console

    from kdscale.eval.chat import Chat
    from kdscale.eval.samples import Sampling
    from kdscale.runtime.device import resolve_device, resolve_dtype, set_threads

    folder = run_folder(run)
    config = load(str(folder), None)
    set_threads(config.runtime.threads)
    device = resolve_device(config.runtime.device)
    chat = Chat(
        _folders(folder, models),
        dtype=resolve_dtype(config.eval.dtype, device),
        device=device,
        data=config.data,
        trust_remote_code=config.teacher.trust_remote_code,
    )
    heat = config.eval.sample_temperature if temperature is None else temperature
    sampling = Sampling(heat, config.eval.sample_top_p, seed)
    session = _Session(Console(), chat, list(chat.names), max_tokens, sampling)
    if prompt is not None:
        session.ask(prompt)
    else:
        session.talk()


def _folders(run: Path, names: str | None) -> dict[str, Path]:
    """The models to talk to. Raises ConfigError for one that is not there, or where there is none at all."""
    if names is not None:
        wanted = list(dict.fromkeys(name.strip() for name in names.split(",") if name.strip()))
        if not wanted:
            raise ConfigError("--models", expected="names, such as teacher,distilled", got=repr(names))
        return {name: model_folder(run, name) for name in wanted}
    there: dict[str, Path] = {}
    for name in model_folders(run, load(str(run), None)):
        try:
            there[name] = model_folder(run, name)
        except ConfigError as missing:
            problem = missing
            print(f"note: without the {name} model: {missing.got or missing.what}", file=sys.stderr)
    if not there:
        raise problem
    return there


@dataclass
class _Session:
    """What is said in one terminal, and with which settings."""

    console: Console
    chat: Chat
    names: list[str]
    tokens: int
    sampling: Sampling
    asked: int = 0

    def talk(self) -> None:
        """Questions and commands until the end of the input."""
        say = self._say
        if sys.stdin.isatty():
            _use_readline()
            how = "through their chat template" if self.chat.templated else "who go on from what you write"
            say(f"{', '.join(self.names)}, {how}. /help lists commands.")
            if not self.chat.together:
                say("They do not fit in memory together: each is loaded for its answer.")
        while (line := self._line()) is not None:
            try:
                if line.startswith("/"):
                    if not self._obey(*line[1:].split(maxsplit=1)):
                        return
                elif line:
                    self.ask(line)
            except KdscaleError as error:  # the conversation goes on
                say(f"error: {error}")

    def ask(self, question: str) -> None:
        """Ask all models, and show the answers: as they grow on a terminal, once they are there elsewhere."""
        # each question has draws of its own, and each model the same
        sampling = replace(self.sampling, seed=self.sampling.seed + self.asked)
        self.asked += 1
        answers: dict[str, Answer] = {}
        steps = self.chat.ask(question, self.names, self.tokens, sampling)
        try:
            with _live(self.console) as live:
                for answers in steps:
                    if live is not None:
                        live.update(self._shown(answers), refresh=True)
        except KeyboardInterrupt:
            self._say("stopped")
        finally:
            steps.close()  # type: ignore[attr-defined]
        if self.console.is_terminal:
            self.console.print(self._shown(answers))
        else:
            for name, answer in answers.items():
                print(f"{for_terminal(name)}: {_said(answer)}\n", flush=True)

    def _shown(self, answers: dict[str, Answer]) -> RenderableType:
        """The answers in columns, or below each other; their text is never taken for markup."""
        from rich.panel import Panel
        from rich.table import Table
        from rich.text import Text

        panels = [
            Panel(Text(_said(answer)), title=Text(name), subtitle=Text(_pace(answer)))
            for name, answer in answers.items()
        ]
        in_columns = self.console.width >= _NARROWEST_COLUMN * len(panels)
        table = Table.grid(expand=True)
        for _ in panels if in_columns else [None]:
            table.add_column(ratio=1)
        for row in [panels] if in_columns else [[panel] for panel in panels]:
            table.add_row(*row)
        return table

    def _line(self) -> str | None:
        try:
            return input("\n> " if sys.stdin.isatty() else "").strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print()
            self._say("Ctrl-D or /quit leaves")
            return ""

    def _obey(self, command: str = "", argument: str = "") -> bool:
        """Do what a line that begins with / says; False to leave."""
        commands: dict[str, Callable[[str], None]] = {
            "reset": self._reset,
            "models": self._choose,
            "temperature": self._heat,
            "tokens": self._limit,
            "help": lambda _: self._say(_HELP),
        }
        if command in ("quit", "exit"):
            return False
        if command not in commands:
            raise ConfigError(f"/{command}", expected=_HELP)
        commands[command](argument)
        return True

    def _reset(self, _: str) -> None:
        self.chat.forget()
        self.asked = 0
        self._say("a new conversation")

    def _choose(self, names: str) -> None:
        wanted = list(dict.fromkeys(names.replace(",", " ").split()))
        if unknown := [name for name in wanted if name not in self.chat.names]:
            raise ConfigError("/models", expected=", ".join(self.chat.names), got=", ".join(unknown))
        self.names = wanted or self.names
        self._say(f"answering: {', '.join(self.names)} (of {', '.join(self.chat.names)})")

    def _heat(self, number: str) -> None:
        if number:
            self.sampling = replace(self.sampling, temperature=_number(number, "/temperature", 0.0, 100.0))
        self._say(f"temperature {self.sampling.temperature:g}")

    def _limit(self, number: str) -> None:
        if number:
            self.tokens = int(_number(number, "/tokens", 1, 10**6))
        self._say(f"at most {self.tokens:,} tokens an answer")

    def _say(self, text: str) -> None:
        self.console.print(for_terminal(text), style="dim", markup=False, highlight=False, soft_wrap=True)


def _number(text: str, what: str, least: float, most: float) -> float:
    try:
        value = float(text)
    except ValueError:
        value = float("nan")
    if not least <= value <= most:
        raise ConfigError(what, expected=f"a number from {least:g} to {most:g}", got=text)
    return value


def _live(console: Console) -> AbstractContextManager[Live | None]:
    """What shows the answers as they grow; None where the output is no terminal."""
    from rich.live import Live

    return Live(console=console, transient=True, auto_refresh=False) if console.is_terminal else nullcontext()


def _said(answer: Answer) -> str:
    return for_terminal(answer.text).strip().rstrip(_HALF_A_CHARACTER)


def _pace(answer: Answer) -> str:
    if not answer.tokens:
        return "no answer" if answer.finished else "…"
    return f"{answer.tokens} tokens · {answer.tokens / max(answer.seconds, 1e-9):.1f} tok/s"


def _use_readline() -> None:
    """Lines can be edited and called back, where Python has readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
