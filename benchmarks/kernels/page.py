"""One self-contained page of a table: bars for time and memory by op and shape, gradient errors, every row.

The page is well-formed XML, takes light or dark from the reader's system, and loads nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path

from rows import COLUMNS, ERROR_COLUMNS, Row
from verdicts import Verdict

from kdscale import files

OPS = {
    "linear_sparse_kl": "Student's side: hidden states and head → loss and gradients, targets given",
    "teacher_and_student": "Both sides: the teacher's hidden states → targets → loss and gradients",
    "linear_topk_lse": "Teacher's side: hidden states and head → top-k and log-sum-exp",
    "sparse_kl": "Logits that already exist → loss and their gradient",
}
LONGEST = 2.5  # times ours: longer bars are cut there, so that one slow contestant does not flatten the others
LABEL, PANEL, VALUE, LINE, TOP = 362, 200, 114, 26, 34
STYLE = """
:root { --ink:#1c2126; --muted:#5c6670; --line:#d9dee3; --card:#ffffff; --page:#f4f6f8;
        --ours:#0a6cc4; --peer:#9aa7b3; --floor:#c98a1b; --good:#1c7d45; --bad:#b3261e; }
@media (prefers-color-scheme: dark) {
:root { --ink:#e8ecef; --muted:#9ba6b0; --line:#343c44; --card:#1a1f24; --page:#111417;
        --ours:#5aaef5; --peer:#66727d; --floor:#e0a94a; --good:#5fcf8d; --bad:#ff8a80; } }
body { margin:0; background:var(--page); color:var(--ink); font:15px/1.5 system-ui,sans-serif; }
main { max-width:1040px; margin:0 auto; padding:28px 18px 60px; }
h1 { font-size:26px; margin:0 0 4px; } h2 { font-size:20px; margin:36px 0 4px; } h3 { font-size:15px; margin:0 0 2px; }
p { margin:4px 0 12px; } .muted, figcaption { color:var(--muted); font-size:13.5px; }
figure, .card { background:var(--card); border:1px solid var(--line); border-radius:8px; padding:14px 16px;
  margin:14px 0; overflow-x:auto; }
svg { display:block; width:100%; min-width:760px; height:auto; }
svg text { font:13px system-ui,sans-serif; fill:var(--ink); paint-order:stroke; stroke:var(--card); stroke-width:3px; }
svg .m { fill:var(--muted); font-size:12px; } svg .head { font-weight:600; font-size:13px; }
.ours { fill:var(--ours); } .peer { fill:var(--peer); } .floor { fill:var(--floor); }
line { stroke:var(--line); } .whisker { stroke:var(--ink); stroke-width:1.5; }
.one { stroke:var(--ours); stroke-dasharray:3 3; }
table { border-collapse:collapse; font-size:13px; }
th,td { padding:3px 10px 3px 0; text-align:left; white-space:nowrap; }
td.n, th.n { text-align:right; font-variant-numeric:tabular-nums; } tr { border-bottom:1px solid var(--line); }
.good { color:var(--good); } .bad { color:var(--bad); } summary { cursor:pointer; }
"""


def write_page(path: Path, rows: Sequence[Row], verdicts: Sequence[Verdict], command: str) -> None:
    """Write the page of a table."""
    files.write_text(path, page(rows, verdicts, command))


def page(rows: Sequence[Row], verdicts: Sequence[Verdict], command: str) -> str:
    """The page of a table as XHTML."""
    first = rows[0]
    threads = f", threads: {first.threads}" if first.threads != "" else ""
    peers = sorted({row.peer for row in rows if " " in row.peer and not row.peer.startswith(("torch ", "kdscale "))})
    about = [
        f"{first.device}{threads}",
        f"torch {first.torch}",
        f"triton {first.triton or 'not installed'}",
        *peers,
        first.date,
    ]
    parts = [
        "<h1>kdscale_kernels against its peers</h1>",
        f'<p class="muted">{escape(" · ".join(about))}<br/>run.py {escape(command)}</p>',
        _targets(verdicts),
        "<p>Bars are medians; contestants take turns in one process, and a ratio compares calls of the same round "
        "(whiskers: 20 % to 80 % of the rounds). Ratio 1 is kdscale, auto. Memory is beyond the inputs and the "
        "gradients handed back (for existing logits: with their gradient). Blue: kdscale; orange: the bare library "
        "products, or copy, that bound it; grey: others (» cut at 2.5). "
        "Forward and backward, unless the op has no gradients.</p>",
    ]
    for op in dict.fromkeys(row.op for row in rows):
        parts.append(f"<h2>{escape(op)}</h2><p class='muted'>{escape(OPS[op])}</p>")
        for shape in dict.fromkeys(row.shape for row in rows if row.op == op):
            shown = [row for row in rows if row.op == op and row.shape == shape]
            parts.append(_figure(shown))
    parts += [_errors(rows), _all(rows)]
    return (
        '<!DOCTYPE html>\n<html lang="en" xmlns="http://www.w3.org/1999/xhtml"><head><meta charset="utf-8"/>'
        '<meta name="viewport" content="width=device-width, initial-scale=1"/>'
        f"<title>kdscale_kernels, {escape(first.device)}, {first.date}</title><style>{STYLE}</style></head>"
        f"<body><main>{''.join(parts)}</main></body></html>\n"
    )


def _targets(verdicts: Sequence[Verdict]) -> str:
    if not verdicts:
        return ""
    words = {True: ("good", "met"), False: ("bad", "missed"), None: ("muted", "not measured")}
    lines = "".join(
        f"<tr><td>{escape(v.target)}</td><td class='n'>{escape(v.limit)}</td><td class='n'>{escape(v.measured)}</td>"
        f"<td class='{words[v.met][0]}'>{words[v.met][1]}</td></tr>"
        for v in verdicts
    )
    head = "<tr><th>target</th><th class='n'>limit</th><th class='n'>measured</th><th></th></tr>"
    return f"<div class='card'><table>{head}{lines}</table></div>"


def _figure(rows: Sequence[Row]) -> str:
    """The direction with gradients where there is one; contestants without a time are named below."""
    direction = max(row.direction for row in rows)  # "forward+backward" sorts after "forward"
    rows = [row for row in rows if row.direction == direction]
    shown = sorted((row for row in rows if row.seconds_median != ""), key=lambda row: float(row.seconds_median))
    n, h, v, k, dtype = rows[0].shape
    title = f"N={n:,} H={h:,} V={v:,} K={k} {dtype}, {direction}"
    reasons: dict[str, list[str]] = {}
    for row in rows:
        if row.status != "ok":
            reasons.setdefault(f"{row.status}: {row.reason}".strip(": "), []).append(row.label)
    missing = [f"<br/>{escape(why)} – {escape('; '.join(labels))}" for why, labels in reasons.items()]
    left_out = f"<figcaption>Without a time:{''.join(missing)}</figcaption>" if missing else ""
    return f"<figure><h3>{escape(title)}</h3>{_bars(title, shown) if shown else ''}{left_out}</figure>"


def _bars(title: str, rows: Sequence[Row]) -> str:
    width, height = LABEL + 2 * (PANEL + VALUE), TOP + LINE * len(rows) + 4
    most = min(LONGEST, max(float(row.ratio_p80 or 0) for row in rows)) or 1.0
    peaks = [int(row.peak_bytes) for row in rows if row.peak_bytes != ""]
    top = max(peaks, default=1) or 1
    memory_x = LABEL + PANEL + VALUE
    one = LABEL + PANEL / most
    drawn = [
        f"<line class='one' x1='{one:.1f}' x2='{one:.1f}' y1='{TOP - 4}' y2='{height}'/>",
        f"<text class='head' x='{LABEL}' y='18'>time, against kdscale</text>",
        f"<text class='head' x='{memory_x}' y='18'>peak memory</text>",
    ]
    for i, row in enumerate(rows):
        y = TOP + LINE * i
        kind = "ours" if row.contestant == "kdscale" else "floor" if row.contestant.startswith("bare") else "peer"
        label = row.label + (" (CE)" if row.loss == "CE" else "")
        drawn.append(f"<text x='{LABEL - 10}' y='{y + 14}' text-anchor='end'>{escape(_short(label))}</text>")
        if row.ratio_to_ours != "":
            drawn += _time_bar(row, y, kind, PANEL / most)
        if row.peak_bytes != "":
            length = PANEL * int(row.peak_bytes) / top
            drawn.append(f"<rect class='{kind}' x='{memory_x}' y='{y + 3}' width='{length:.1f}' height='15' rx='2'/>")
            text = f"{int(row.peak_bytes) / 2**20:,.0f} MiB"
            drawn.append(f"<text class='m' x='{memory_x + length + 6:.1f}' y='{y + 15}'>{text}</text>")
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {width} {height}' role='img' "
        f"aria-label='{escape(title)}: time and memory, values in the table below'>{''.join(drawn)}</svg>"
    )


def _time_bar(row: Row, y: int, kind: str, scale: float) -> list[str]:
    ratio, low, high = (float(v) for v in (row.ratio_to_ours, row.ratio_p20, row.ratio_p80))
    length, start, end = (min(PANEL, max(0.0, value) * scale) for value in (ratio, low, high))
    start, end, y_line = LABEL + start, LABEL + end, y + 10.5
    text = f"{'» ' * (ratio > LONGEST)}{ratio:.2f} · {_seconds(float(row.seconds_median))}"
    return [
        f"<rect class='{kind}' x='{LABEL}' y='{y + 3}' width='{length:.1f}' height='15' rx='2'/>",
        f"<line class='whisker' x1='{start:.1f}' x2='{end:.1f}' y1='{y_line}' y2='{y_line}'/>",
        f"<text class='m' x='{end + 6:.1f}' y='{y + 15}'>{text}</text>",
    ]


def _short(text: str, most: int = 54) -> str:
    return text if len(text) <= most else text[: most - 1] + "…"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.3g} ms"


def _errors(rows: Sequence[Row]) -> str:
    shown = [row for row in rows if any(getattr(row, column) != "" for column in ERROR_COLUMNS)]
    if not shown:
        return ""
    short = [c.removeprefix("error_").replace("_noise_0", " .").replace("_", " ") for c in ERROR_COLUMNS]
    head = "".join(f"<th class='n'>{name}</th>" for name in short)
    lines = []
    for row in shown:
        cells = "".join(
            f"<td class='n{' bad' if v != '' and float(v) > 5e-3 else ''}'>{v}</td>"
            for v in (getattr(row, column) for column in ERROR_COLUMNS)
        )
        what = f"<td>{escape(row.op)}</td><td>{escape(row.label)}</td><td>{escape(row.loss)}</td>"
        lines.append(f"<tr>{what}<td class='n'>{row.V}</td>{cells}</tr>")
    return (
        "<h2>Gradient errors</h2><p class='muted'>Relative to fp64 autograd of the same loss (Frobenius norm), at most "
        "128 rows; random: unrelated teacher and student; .3 and .05: student = teacher + that much noise. Above "
        "0.005 in red. For sparse_kl, dX is the gradient of the logits.</p>"
        f"<div class='card' style='overflow-x:auto'><table><tr><th>op</th><th>contestant</th><th>loss</th>"
        f"<th class='n'>V</th>{head}</tr>{''.join(lines)}</table></div>"
    )


def _all(rows: Sequence[Row]) -> str:
    constant = {"device", "threads", "torch", "triton", "date"}
    columns = [c for c in COLUMNS if c not in constant and c not in ERROR_COLUMNS]
    head = "".join(f"<th>{c}</th>" for c in columns)
    lines = "".join("<tr>" + "".join(f"<td>{escape(str(getattr(r, c)))}</td>" for c in columns) + "</tr>" for r in rows)
    return (
        f"<h2>Every row</h2><details class='card'><summary>{len(rows)} rows</summary>"
        f"<table><tr>{head}</tr>{lines}</table></details>"
    )
