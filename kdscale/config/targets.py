"""`distill.served`: where the teacher's answers come from when it runs in another process."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field, model_validator

from kdscale.config.fields import Section

TEACHER_TOKEN = "teacher.token"  # in the run folder, where served.token_file says nothing else


class ServedConfig(Section):
    """Where `kdscale serve-teacher` answers, for distill.teacher_placement: served."""

    urls: tuple[str, ...] = Field(strict=False, default=())  # http://HOST:PORT; several share the questions
    token_file: str | None = None  # None: teacher.token in the run folder
    timeout: Annotated[float, Field(gt=0.0)] = 600.0  # seconds without an answer from any of them

    @model_validator(mode="after")
    def _urls_are_urls(self) -> ServedConfig:
        wrong = [url for url in self.urls if not url.startswith(("http://", "https://"))]
        if wrong:
            raise ValueError(f"urls: expected http://HOST:PORT, got {', '.join(wrong)}")
        return self
