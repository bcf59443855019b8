"""An Ollama Modelfile for a package's GGUF file, with the chat template where it can be said in Ollama's terms.

Ollama fills templates of Go's text/template, and a model's chat template is a program in Jinja. Most of these write
each message between two fixed texts that depend on its role alone. Whether one does is found out by rendering: the
texts are read off conversations of marks, and what they make of further conversations must equal what the template
makes. Where it does not, the Modelfile has no template and says so.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kdscale.models.loading import load_tokenizer
from kdscale.packaging.gguf_writer import end_ids
from kdscale.weights import read_config

Message = tuple[str, str]  # role and content
Render = Callable[[Sequence[Message], bool], str]  # the conversation, and whether an answer is to follow

_QUOTES = '"""'
_MARK = "kdscalemark{}end"
_ROLES = ("system", "user", "assistant")
_CHECKED: tuple[tuple[Message, ...], ...] = (
    (("user", "Why?"),),
    (("user", "Why?"), ("assistant", "So."), ("user", "And then?")),
    (("system", "Be brief."), ("user", "Why is {{ x }} so?\n\nTell me."), ("assistant", "It is."), ("user", "Thanks")),
    (("system", "Be brief."), ("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d"), ("user", "e")),
)


@dataclass(frozen=True)
class RoleTexts:
    """A chat template that writes each message between two texts of its role, and `answer` where an answer follows.

    `default_system` is the content of the system message that it adds to a conversation without one.
    """

    before: dict[str, str]
    after: dict[str, str]
    answer: str
    start: str = ""
    default_system: str | None = None

    def render(self, messages: Sequence[Message], answer: bool) -> str:
        """What Ollama makes of a conversation."""
        if self.default_system is not None and messages[0][0] != "system":
            messages = [("system", self.default_system), *messages]
        text = "".join(f"{self.before[role]}{content}{self.after[role]}" for role, content in messages)
        return self.start + text + (self.answer if answer else "")

    def in_go(self) -> str:
        """The template for Ollama; an answer that it is to go on with stays open."""
        branches = "".join(
            f"{{{{ {'if' if role == 'system' else 'else if'} eq .Role {_go_string(role)} }}}}"
            f"{_literal(self.before[role])}{{{{ .Content }}}}"
            + (
                f"{{{{ if not $last }}}}{_literal(self.after[role])}{{{{ end }}}}"
                if role == "assistant"
                else _literal(self.after[role])
            )
            for role in _ROLES
        )
        return (
            f"{_literal(self.start)}{{{{ range $i, $_ := .Messages }}}}"
            "{{ $last := eq (len (slice $.Messages $i)) 1 }}"
            f'{branches}{{{{ end }}}}{{{{ if and $last (ne .Role "assistant") }}}}{_literal(self.answer)}{{{{ end }}}}'
            "{{ end }}"
        )


def modelfile(gguf: str, folder: Path, licence: str = "") -> tuple[str, str]:
    """The Modelfile for the file `gguf` beside it, and a note on what it could not say ("" for nothing).

    `folder`: the same model as a standard checkpoint, whose tokenizer and chat template count.
    """
    tokenizer = load_tokenizer(folder)
    lines, note, texts = [f"FROM ./{gguf}"], "", None
    if tokenizer.chat_template:
        texts = role_texts(_renderer(tokenizer), _bos(tokenizer))
        if texts is None:
            note = "the chat template is a program that Ollama's templates cannot say: the Modelfile has none"
    else:
        note = "the model has no chat template: Ollama passes a prompt on as it is"
        lines.append('TEMPLATE """{{ .Prompt }}"""')
    if texts is not None:
        lines.append(f"TEMPLATE {_QUOTES}{texts.in_go()}{_QUOTES}")
        if texts.default_system is not None:
            lines.append(f"SYSTEM {_QUOTES}{texts.default_system}{_QUOTES}")
    lines += [f"PARAMETER stop {_quoted(token)}" for token in stop_tokens(folder, tokenizer) if _can_quote(token)]
    if licence and _can_quote(licence, lines=True):
        lines.append(f"LICENSE {_QUOTES}{licence}{_QUOTES}")
    comment = f"# {note}\n" if note else ""
    return comment + "\n".join(lines) + "\n", note


def stop_tokens(folder: Path, tokenizer: Any) -> list[str]:
    """The tokens that end an answer."""
    ids = end_ids(folder, read_config(folder), tokenizer.eos_token_id)
    tokens = [tokenizer.convert_ids_to_tokens(i) for i in ids]
    return [token for token in tokens if isinstance(token, str) and token]


def role_texts(render: Render, bos: str = "") -> RoleTexts | None:
    """The texts around each role's messages, or None for a template that is not of this kind.

    `bos`: what llama.cpp puts before a text by itself, and so must not stand in Ollama's template too.
    """
    try:
        texts = _read_off(render)
        for conversation in _CHECKED:
            for answer in (True, False):
                if texts.render(conversation, answer) != render(conversation, answer):
                    return None
    except (_NotOfThisKindError, ValueError):
        return None
    if bos and texts.start.startswith(bos):
        texts = RoleTexts(texts.before, texts.after, texts.answer, texts.start[len(bos) :], texts.default_system)
    said = [*texts.before.values(), *texts.after.values(), texts.answer, texts.start, texts.default_system or ""]
    return texts if all(_can_quote(text, lines=True) for text in said) else None


class _NotOfThisKindError(Exception):
    """The template does more than write texts around messages."""


def _read_off(render: Render) -> RoleTexts:
    system, user, assistant, second = (_MARK.format(name) for name in ("s", "u", "a", "v"))
    talk = [("system", system), ("user", user), ("assistant", assistant), ("user", second)]
    start_system, between, after_user, after_assistant, after_second = _split(render(talk, False), talk)
    _, _, tail = _split(render(talk[:2], False), talk[:2])  # what follows a user's message at the end
    opened = render(talk, True)
    closed = render(talk, False)
    if not opened.startswith(closed) or tail != after_second or not after_user.startswith(tail):
        raise _NotOfThisKindError
    before_assistant = after_user[len(tail) :]
    *_, end_assistant = _split(render(talk[:3], False), talk[:3])
    if not after_assistant.startswith(end_assistant):
        raise _NotOfThisKindError
    before_user = after_assistant[len(end_assistant) :]
    if not between.endswith(before_user):
        raise _NotOfThisKindError
    after_system = between[: len(between) - len(before_user)]
    first_alone = _split(render([("user", user)], False), [("user", user)])[0]
    start, before_system, default = _beginning(start_system, after_system, before_user, first_alone)
    return RoleTexts(
        before={"system": before_system, "user": before_user, "assistant": before_assistant},
        after={"system": after_system, "user": tail, "assistant": end_assistant},
        answer=opened[len(closed) :],
        start=start,
        default_system=default,
    )


def _beginning(start_system: str, after_system: str, before_user: str, first: str) -> tuple[str, str, str | None]:
    """What every conversation begins with, what stands before a system message, and a default one.

    `start_system`: all before a first system message; `first`: all before a first message of the user.
    """
    if not first.endswith(before_user):
        raise _NotOfThisKindError
    head = first[: len(first) - len(before_user)]
    if len(head) > len(start_system) and head.startswith(start_system) and head.endswith(after_system):
        return "", start_system, head[len(start_system) : len(head) - len(after_system)]
    if not start_system.startswith(head):
        raise _NotOfThisKindError
    return head, start_system[len(head) :], None


def _split(text: str, messages: Sequence[Message]) -> list[str]:
    """The texts before, between and after the contents of the messages, which are marks."""
    pattern = "(.*?)" + "(.*?)".join(re.escape(content) for _, content in messages) + "(.*)"
    match = re.fullmatch(pattern, text, re.DOTALL)
    if match is None or any(content in part for _, content in messages for part in match.groups()):
        raise _NotOfThisKindError
    return list(match.groups())


def _renderer(tokenizer: Any) -> Render:
    """Renders by the tokenizer's own template, in the sandbox of transformers."""

    def render(messages: Sequence[Message], answer: bool) -> str:
        try:
            conversation = [{"role": role, "content": content} for role, content in messages]
            return str(tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=answer))
        except Exception as error:  # a template is a program, which may raise anything
            raise _NotOfThisKindError from error

    return render


def _bos(tokenizer: Any) -> str:
    """The token that the tokenizer begins every text with; "" for none."""
    ids = tokenizer("a").input_ids
    return str(tokenizer.bos_token) if ids and ids[0] == tokenizer.bos_token_id is not None else ""


def _can_quote(text: str, lines: bool = False) -> bool:
    """Whether a Modelfile can hold a text: between three quotes, of which it must not end with one, or in one line."""
    return _QUOTES not in text and not text.endswith('"') and "\0" not in text and (lines or "\n" not in text)


def _quoted(text: str) -> str:
    return f"{_QUOTES}{text}{_QUOTES}" if '"' in text or "\\" in text else f'"{text}"'


def _literal(text: str) -> str:
    """A text as a template of Go writes it out. A brace at its end would begin an action with those that follow."""
    return re.sub(r"\{{2,}|\{$", lambda found: f'{{{{ "{found[0]}" }}}}', text)


def _go_string(text: str) -> str:
    return f'"{text}"'
