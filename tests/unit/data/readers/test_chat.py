"""Conversations: the text of any chat template, where its answers are, and what is refused with which words."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from kdscale.config.data import DataConfig, SourceConfig
from kdscale.data.readers.chat import ChatTemplate, chat_template
from kdscale.data.sources import read_documents
from kdscale.errors import ConfigError, DataError, FileError

LOOP = "{%% for m in messages %%}%s{%% endfor %%}{%% if add_generation_prompt %%}%s{%% endif %%}"
TEMPLATES = {
    # name: (template, what it puts around an answer: before it, behind it and learned, behind it and not learned)
    "with an end token": (
        LOOP % ("[{{ m.role }}]\n{{ m.content }}<|end|>\n", "[assistant]\n"), "[assistant]\n", "<|end|>", "\n",
    ),
    "trimmed": (
        LOOP % ("[{{ m.role }}] {{ m.content | trim }} <|end|>", "[assistant] "), "[assistant] ", " <|end|>", "",
    ),
    "plain": (LOOP % ("{{ m.role }}: {{ m.content }}\n\n", "assistant: "), "assistant: ", "", "\n\n"),
    "bare": ("{% for m in messages %}{{ m.content }}{% endfor %}", "", "", ""),
}  # fmt: skip
# as Qwen3 does: an answer's thoughts are written apart from the rest of it, and left out of earlier turns
THINKING = (
    "{% for m in messages %}[{{ m.role }}]{% if '</think>' in m.content %}{% set parts = m.content.split('</think>') %}"
    "{% if loop.last %}<think>{{ parts[0].replace('<think>', '') | trim }}</think>{% endif %}{{ parts[1] | trim }}"
    "{% else %}{% if m.role == 'assistant' and loop.last %}<think></think>{% endif %}{{ m.content }}{% endif %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}[assistant]{% endif %}"
)
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "One?"},
    {"role": "assistant", "content": "First answer."},
    {"role": "user", "content": "First answer."},
    {"role": "assistant", "content": " "},
    {"role": "user", "content": "Go on."},
    {"role": "assistant", "content": "Last, né\ue000e."},
]


def answers(tokenizer: Any, template: str, messages: list[dict[str, Any]]) -> list[str]:
    chat = ChatTemplate(tokenizer, template).chat(messages, "here")
    assert all(0 <= start <= end <= len(chat.text) for start, end in chat.answers)
    return [chat.text[start:end] for start, end in chat.answers]


@pytest.mark.parametrize("name", TEMPLATES)
def test_answers_with_what_ends_them_are_learned_and_nothing_else(tokenizer, name):
    template, before, learned, behind = TEMPLATES[name]
    chat = ChatTemplate(tokenizer, template).chat(CHAT, "here")
    trim = str.strip if name == "trimmed" else str
    wanted = [trim(message["content"]) + learned for message in CHAT if message["role"] == "assistant"]
    assert [chat.text[start:end] for start, end in chat.answers] == wanted
    for start, end in chat.answers:
        assert chat.text[:start].endswith(before) and chat.text[end:].startswith(behind)


def test_thoughts_written_apart_belong_to_the_answer(tokenizer):
    thought = {"role": "assistant", "content": "<think>hm\n</think>\nyes"}
    asked = {"role": "user", "content": "q"}
    assert answers(tokenizer, THINKING, [asked, thought]) == ["<think>hm</think>yes<|end|>"]
    assert answers(tokenizer, THINKING, [asked, thought, asked, thought]) == [
        "yes<|end|>", "<think>hm</think>yes<|end|>",
    ]  # fmt: skip


def test_sharegpt_names_parts_and_tools(tokenizer):
    template = ChatTemplate(tokenizer, TEMPLATES["plain"][0])
    conversation = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    assert template.chat(conversation, "here").text == "user: q\n\nassistant: a\n\n"
    parts = [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "a"}]
    assert template.chat(messages, "here").text.startswith("user: q!\n")
    assert not template.left_out_tools
    called = [
        messages[0],
        {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]},
        {"role": "tool", "content": "42"},
        messages[1],
    ]
    assert template.chat(called, "here").text == "user: q!\n\nassistant: a\n\n"
    assert template.left_out_tools


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ("hi", r"list of messages(.|\n)*str"),
        (["hi"], r"list of messages(.|\n)*a list with str"),
        ([], "no answer to learn from"),
        ([{"role": "user", "content": "q"}], "no answer to learn from"),
        ([{"role": "judge", "content": "q"}], r"message 1: role(.|\n)*assistant(.|\n)*judge"),
        ([{"role": 3, "content": "q"}], "message 1: role"),
        ([{"content": "q"}], "message 1: role"),
        ([{"role": "assistant"}], r"message 1: content(.|\n)*NoneType"),
        ([{"role": "assistant", "content": [{"type": "image", "url": "x"}]}], r"message 1: content(.|\n)*list"),
        ([{"role": "assistant", "content": "\ud800"}], "not valid Unicode"),
    ],
)
def test_refusals(tokenizer, messages, words):
    with pytest.raises(DataError, match=words):
        ChatTemplate(tokenizer, TEMPLATES["plain"][0]).chat(messages, "x.jsonl line 3")


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{{ raise_exception('roles must take turns') }}", "refuses this(.|\n)*roles must take turns"),
        ("{{ messages[", "refuses this"),
        ("{{ 1 / 0 }}", "refuses this"),
        ("{{ messages[0].content.__class__.__mro__ }}", "refuses this"),
        ("nothing of it", "does not say where"),
        ("{% for m in messages %}{{ m.content }}{{ m.content }}{% endfor %}", "does not say where"),
    ],
)
def test_templates_that_cannot_be_used(tokenizer, template, words):
    with pytest.raises(DataError, match=words):
        ChatTemplate(tokenizer, template).chat(CHAT, "here")


def test_a_template_may_change_an_answer(tokenizer):
    template = "{% for m in messages %}{{ m.content | upper }}{% endfor %}{{ messages | length }}"
    assert answers(tokenizer, template, CHAT[:3]) == ["FIRST ANSWER."]


def test_a_chat_needs_a_template(tokenizer, tmp_path: Path):
    chats = DataConfig(sources=(SourceConfig(path="x.jsonl", chat=True),))
    with pytest.raises(ConfigError, match=r"data\.chat_template"):
        chat_template(chats, tokenizer)
    assert chat_template(DataConfig(), tokenizer).text is None
    own = tmp_path / "own.jinja"
    with pytest.raises(FileError, match=r"own\.jinja"):
        chat_template(chats.model_copy(update={"chat_template": str(own)}), tokenizer)
    own.write_text(TEMPLATES["plain"][0])
    template = chat_template(chats.model_copy(update={"chat_template": str(own)}), tokenizer)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"messages": CHAT[1:3], "source": "responses"}) + "\n")
    (document,) = read_documents(SourceConfig(path=str(path), chat=True), template)
    assert (document.text, document.source) == ("user: One?\n\nassistant: First answer.\n\n", "responses")
    assert [document.text[a:b] for a, b in document.answers] == ["First answer."]
