"""A real teacher service on this machine, in a thread of the test's process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

TOKEN = "a-token-of-the-test"


@contextmanager
def serving_teacher(model: Any, folder: Path, max_length: int) -> Iterator[tuple[str, int]]:
    """Where a service answers, on the CPU, questions of up to 4096 tokens to the model of `folder`; it asks for TOKEN.

    `max_length` is that of a sequence.
    """
    import torch

    from kdscale.runtime.listening import listen
    from kdscale.teacher.connections import make_server
    from kdscale.teacher.server import TeacherService, make_app

    service = TeacherService(model, folder, device=torch.device("cpu"), max_tokens=4096, max_length=max_length)
    listener = listen("127.0.0.1", 0)
    server = make_server(make_app(service, TOKEN))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield listener.getsockname()[:2]
    finally:
        server.should_exit = True
        thread.join()
