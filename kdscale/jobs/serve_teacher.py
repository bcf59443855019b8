"""`kdscale serve-teacher`: start the teacher server and listen."""

from __future__ import annotations

from pathlib import Path

from kdscale.config.distill.targets import TEACHER_TOKEN
from kdscale.config.root import Config
from kdscale.errors import ConfigError
from kdscale.models.loading import check_writes_text, load_model
from kdscale.pipeline.checks import check_teacher
from kdscale.runs.folder import RunFolder
from kdscale.runs.lineage import distilled_from
from kdscale.runtime.device import resolve_device, resolve_dtype, set_threads
from kdscale.runtime.kernel_backend import agree_on_backend, try_launch
from kdscale.runtime.listening import address_of, listen
from kdscale.runtime.progress import Reporter
from kdscale.teacher.server import TeacherService, make_app, make_token


def start(
    config: Config, *, host: str, port: int, token_file: Path | None, max_tokens: int, max_length: int | None
) -> None:
    """Load the run's teacher and answer until SIGINT or SIGTERM; a request in progress is finished first.

    `token_file` is read, or written with a new token; None is teacher.token in the run folder. `max_length`: of a
    question's sequences; None is distill.seq_len. Raises ConfigError for an address or port that cannot be used.
    """
    from kdscale.teacher.connections import make_server

    listener = listen(host, port)  # before the model is loaded: a port that is taken is reported at once
    token_path = token_file or Path(config.run_dir) / TEACHER_TOKEN
    token = make_token(token_path)
    teacher_dir = distilled_from(RunFolder(Path(config.run_dir)), config, check_teacher(config))
    if not teacher_dir.exists():
        raise ConfigError(
            "the teacher to serve", expected=f"the model that the student learns from, {teacher_dir}",
            got="no such folder", hint="`kdscale run CONFIG --until prune` makes it",
        )  # fmt: skip
    check_writes_text(teacher_dir, "the teacher to serve")
    reporter = Reporter()
    if (obstacle := agree_on_backend(try_launch(config))) is not None:
        reporter.say(f"note: the kernels run in torch: {obstacle}")
    device = resolve_device(config.runtime.device)
    set_threads(config.runtime.threads)
    dtype = resolve_dtype(config.distill.dtype, device)
    model = load_model(
        teacher_dir, dtype=dtype, device=device, trust_remote_code=config.teacher.trust_remote_code
    ).requires_grad_(False)
    length = max_length or config.distill.seq_len
    service = TeacherService(model, teacher_dir, device=device, max_tokens=max_tokens, max_length=length)
    reporter.say(f"{teacher_dir} in {str(dtype).removeprefix('torch.')} on {device}, token in {token_path}")
    reporter.say(f"answering at {address_of(listener, host)}; Ctrl-C stops it")
    if host not in ("127.0.0.1", "::1", "localhost"):
        reporter.say("requests and answers are not encrypted: keep this port inside your cluster's network")
    make_server(make_app(service, token)).run(sockets=[listener])
