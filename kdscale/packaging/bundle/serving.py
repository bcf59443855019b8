"""What serves a package with vLLM: a Dockerfile, a compose file, and the line for vLLM itself."""

from __future__ import annotations

import io
import json
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

VLLM_TAG = "v0.33.0"  # of vllm/vllm-openai; its transformers reads configs as transformers 5 writes them
PORT = 8000
TOKEN_VARIABLE = "VLLM_API_KEY"
SET_TOKEN = f"export {TOKEN_VARIABLE}=$(openssl rand -hex 24)"  # for the server, and for what asks it
_USER = 10001  # neither root nor a user of the image
_CODE = "*.py"
# By pattern, and only those that a package has: no name of a file stands in the Dockerfile.
_MODEL_FILES = (
    "config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template.*", _CODE,
)  # fmt: skip


def serve_line(served_name: str, own_code: bool, folder: str = ".", host: str = "127.0.0.1") -> list[str]:
    """The command that serves a folder with vLLM, which by itself would listen on every address."""
    line = ["vllm", "serve", folder, "--served-model-name", served_name, "--host", host]
    return [*line, "--trust-remote-code"] if own_code else line


def dockerfile(folders: Sequence[Path], served_name: str, own_code: bool) -> str:
    """A Dockerfile that serves, as no root user, the weights in the first of these folders.

    The others lie below it, and `FORM` chooses one by its name.
    """
    patterns = [
        pattern
        for pattern in _MODEL_FILES
        if (own_code or pattern != _CODE) and any(next(folder.glob(pattern), None) for folder in folders)
    ]
    copied = " ".join(f"${{FORM}}/{pattern}" for pattern in patterns)
    line = [*serve_line(served_name, own_code, "/model", "0.0.0.0"), "--port", str(PORT)]  # compose says who gets in
    return (
        f"# Served by: docker compose up --build{_other_forms(folders)}\n"
        f"ARG VLLM_TAG={VLLM_TAG}\n"
        "FROM vllm/vllm-openai:${VLLM_TAG}\n"
        "ARG FORM=.\n"
        f"RUN useradd --create-home --uid {_USER} server\n"
        f"COPY --chown={_USER}:{_USER} {copied} /model/\n"
        f"USER {_USER}:{_USER}\n"
        "# The model is here: nothing is asked of a hub, and nothing is reported\n"
        "ENV HOME=/home/server HF_HUB_OFFLINE=1 VLLM_NO_USAGE_STATS=1 DO_NOT_TRACK=1\n"
        f"EXPOSE {PORT}\n"
        f"ENTRYPOINT {json.dumps(line)}\n"
    )


def _other_forms(folders: Sequence[Path]) -> str:
    return "".join(f"; or FORM={folder.name} before it" for folder in folders[1:])


def compose(served_name: str) -> str:
    """compose.yaml: one GPU, a port of this machine alone, a token, no rights beyond a user's, a health check."""
    health = f"import urllib.request; urllib.request.urlopen('http://127.0.0.1:{PORT}/health', timeout=5)"
    service: dict[str, Any] = {
        "build": {"context": ".", "args": {"VLLM_TAG": f"${{VLLM_TAG:-{VLLM_TAG}}}", "FORM": "${FORM:-.}"}},
        "image": f"{served_name}:latest",
        "ports": [f"127.0.0.1:${{PORT:-{PORT}}}:{PORT}"],
        "environment": {TOKEN_VARIABLE: f"${{{TOKEN_VARIABLE}:?set it to a token of your own}}"},
        "shm_size": "2gb",
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges:true"],
        "restart": "unless-stopped",
        "healthcheck": {
            "test": ["CMD", "python3", "-c", health], "interval": "15s", "timeout": "10s", "retries": 5,
            "start_period": "600s",
        },
        "deploy": {
            "resources": {"reservations": {"devices": [{"driver": "nvidia", "count": 1, "capabilities": ["gpu"]}]}}
        },
    }  # fmt: skip
    stream = io.StringIO()
    stream.write(f"# {SET_TOKEN}; docker compose up --build\n")
    yaml = YAML(typ="safe", pure=True)
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.width = 1000
    yaml.dump({"services": {"model": service}}, stream)
    return stream.getvalue()


def in_shell(line: list[str]) -> str:
    """A command as a shell reads it."""
    return shlex.join(line)
