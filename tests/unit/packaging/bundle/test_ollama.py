"""A Modelfile's template makes of a conversation what the chat template makes, or there is none."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from kdscale.packaging.bundle.ollama import Message, Render, modelfile, role_texts

CHATML = (
    "{% for m in messages %}{% if loop.first and m['role'] != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n"
    "{% endif %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA = (
    "{{ '<|begin|>' }}{% for m in messages %}<|start|>{{ m['role'] }}<|end|>\n\n{{ m['content'] | trim }}<|eot|>"
    "{% endfor %}{% if add_generation_prompt %}<|start|>assistant<|end|>\n\n{% endif %}"
)
INTO_FIRST = (  # the system message goes into the user's first message
    "{% if messages[0].role == 'system' %}{% set s = messages[0].content + '\n\n' %}{% set messages = messages[1:] %}"
    "{% endif %}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ s if loop.first }}{{ m.content }} [/INST]"
    "{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
)
NO_SYSTEM = CHATML + "{% if messages[0].role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
UPPER = CHATML.replace("{{ m['content'] }}", "{{ m['content'] | upper }}")
FORGETS = CHATML.replace("{% for m in messages %}", "{% for m in messages %}{% if loop.index > 3 %}…{% endif %}")
BRACES = CHATML.replace("<|im_end|>", "{{ '{{end}}' }}")
QUOTES = CHATML.replace("<|im_end|>", '\\"\\"\\"<|im_end|>').replace('\\"', '"')


def renders(template: str) -> Render:
    compiled = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True).from_string(template)

    def render(messages: Sequence[Message], answer: bool) -> str:
        conversation = [{"role": role, "content": content} for role, content in messages]
        try:
            return compiled.render(messages=conversation, add_generation_prompt=answer)
        except Exception as error:
            raise ValueError(str(error)) from error

    return render


def test_the_texts_around_messages_are_read_off_the_template() -> None:
    texts = role_texts(renders(CHATML))
    assert texts is not None and texts.default_system == "Be kind" and texts.start == ""
    assert texts.before["user"] == "<|im_start|>user\n" and texts.after["user"] == "<|im_end|>\n"
    assert texts.answer == "<|im_start|>assistant\n"
    assert texts.in_go() == (
        "{{ range $i, $_ := .Messages }}{{ $last := eq (len (slice $.Messages $i)) 1 }}"
        '{{ if eq .Role "system" }}<|im_start|>system\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n'
        '{{ else if eq .Role "assistant" }}<|im_start|>assistant\n{{ .Content }}{{ if not $last }}<|im_end|>\n'
        '{{ end }}{{ end }}{{ if and $last (ne .Role "assistant") }}<|im_start|>assistant\n{{ end }}{{ end }}'
    )


@pytest.mark.parametrize(("bos", "start"), [("<|begin|>", ""), ("", "<|begin|>")])
def test_what_llama_cpp_puts_before_a_text_is_not_there_twice(bos: str, start: str) -> None:
    texts = role_texts(renders(LLAMA), bos)
    assert texts is not None and texts.start == start and texts.default_system is None
    assert texts.before["system"] == "<|start|>system<|end|>\n\n"


def test_braces_of_the_template_stay_text() -> None:
    texts = role_texts(renders(BRACES))
    assert texts is not None and '{{ "{{" }}end}}' in texts.in_go()
    said = "{{ m['content'] | trim }}"
    texts = role_texts(renders(LLAMA.replace(said, "{{ '{' }}" + said)))
    assert texts is not None and texts.in_go().count('{{ "{" }}{{ .Content }}') == 3


@pytest.mark.parametrize("template", [INTO_FIRST, NO_SYSTEM, UPPER, FORGETS, QUOTES, "", "{{ messages[0].content }}"])
def test_other_templates_have_no_counterpart(template: str) -> None:
    assert role_texts(renders(template)) is None


@pytest.fixture
def chat_model(tmp_path: Path, tiny_llama_dir: Path) -> Path:
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama_dir, folder)
    (folder / "chat_template.jinja").write_text(CHATML)
    return folder


def test_a_modelfile(chat_model: Path) -> None:
    content, note = modelfile("tiny-q8_0.gguf", chat_model, "The licence.\n")
    assert content.startswith('FROM ./tiny-q8_0.gguf\nTEMPLATE """{{ range') and note == ""
    assert 'SYSTEM """Be kind"""\nPARAMETER stop "<|end|>"\nLICENSE """The licence.\n"""\n' in content


def test_a_modelfile_says_what_it_cannot_say(chat_model: Path) -> None:
    (chat_model / "chat_template.jinja").write_text(UPPER)
    content, note = modelfile("tiny-q8_0.gguf", chat_model, 'ends the text """\nFROM evil')
    assert "program" in note and content == f'# {note}\nFROM ./tiny-q8_0.gguf\nPARAMETER stop "<|end|>"\n'
    (chat_model / "chat_template.jinja").unlink()
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile("tiny-q8_0.gguf", chat_model)[0]
