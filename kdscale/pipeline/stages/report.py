"""The report stage: report.html and report.json."""

from __future__ import annotations

from kdscale.files import atomic_dir
from kdscale.pipeline.stage import Context, Facts


def write_report(context: Context) -> Facts:
    from kdscale.report.html import write_report as write

    with atomic_dir(context.run.report) as tmp:
        write(context.run.path, tmp)
    return {}
