"""A tiny teacher that can chat."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


@pytest.fixture(scope="session")
def chatting_llama_dir(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model with a chat template."""
    folder = tmp_path_factory.mktemp("chatting") / "tiny"
    shutil.copytree(tiny_llama_dir, folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
