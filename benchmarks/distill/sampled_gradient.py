"""How far the gradient of sampled and of top-K targets is from that of the whole distribution, on text; with a plot.

    PYTHONPATH=.:kernels:launch python benchmarks/distill/sampled_gradient.py --run runs/demo --plot out.svg

--run is a run that has been pruned (`kdscale prune CONFIG`). Of forward KL at T = 1, the gradient of the student's head
is the sum over positions of (q − w) hᵀ. The whole distribution has w = p; D draws have w = counts / D; the top K with a
tail bucket have w = p on the K tokens, and outside them the student's own q, scaled to the teacher's mass there. The
error is ‖Σ (p − w) hᵀ‖ / ‖Σ (q − p) hᵀ‖. Noise falls with the number of positions; a bias stays.

C rows of a chunk, V vocabulary, H hidden size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from target_store import Text, read_text

from kdscale.config.load import load_config
from kdscale.teacher.sampling import draw, uniforms_of

DRAWS, TOP_KS = (12, 25, 50, 100), (12, 25, 50, 100)
SHOWN_DRAWS, SHOWN_TOP_KS = (12, 50), (12, 50)
CHUNK = 64


def weights(
    kind: str, number: int, text: Text, batch: int, rows: slice, p_CV: torch.Tensor, q_CV: torch.Tensor
) -> torch.Tensor:
    """The weights [C, V] that targets of `number` draws or entries put in the place of p."""
    if kind == "sampled":
        one = text.batches[batch]
        length = one.input_ids_BS.shape[1]
        uniforms_CD = uniforms_of(one.sequences, length, one.rows_N, number, seed=1)[rows]
        drawn = draw(text.hidden[batch][rows], text.head, uniforms_CD, temperature=1.0, vocab_size=text.head.vocab)
        return torch.zeros_like(p_CV).scatter_add_(1, drawn.ids_NK.clamp_min(0), drawn.weights_NK)
    top = p_CV.topk(number, 1)
    tail_CV = q_CV.scatter(1, top.indices, 0.0)
    scale_C1 = (1 - top.values.sum(1, keepdim=True)) / tail_CV.sum(1, keepdim=True)
    return (tail_CV * scale_C1).scatter_(1, top.indices, top.values)


@torch.no_grad()
def measure(teacher: Text, student: Text) -> dict[tuple[str, int], list[tuple[int, float]]]:
    """(positions, error) after 1, 2, 4, ... chunks, by kind and number."""
    settings = [("sampled", number) for number in DRAWS] + [("topk", number) for number in TOP_KS]
    errors = {setting: torch.zeros_like(student.head.weight_VH) for setting in settings}
    whole_VH, positions, chunks = torch.zeros_like(student.head.weight_VH), 0, 0
    found: dict[tuple[str, int], list[tuple[int, float]]] = {setting: [] for setting in settings}
    for batch, hidden_NH in enumerate(student.hidden):
        for begin in range(0, len(hidden_NH) - CHUNK + 1, CHUNK):
            rows = slice(begin, begin + CHUNK)
            p_CV = teacher.head.logits(teacher.hidden[batch][rows]).softmax(1)
            q_CV = student.head.logits(hidden_NH[rows]).softmax(1)
            whole_VH.addmm_((q_CV - p_CV).T, hidden_NH[rows])
            for setting, error_VH in errors.items():
                w_CV = weights(*setting, teacher, batch, rows, p_CV, q_CV)
                error_VH.addmm_((p_CV - w_CV).T, hidden_NH[rows])
            positions, chunks = positions + CHUNK, chunks + 1
            if chunks & (chunks - 1) == 0:
                for setting, error_VH in errors.items():
                    found[setting].append((positions, float(error_VH.norm() / whole_VH.norm())))
    return found


def draw_plot(found: dict[tuple[str, int], list[tuple[int, float]]], path: Path) -> None:
    """Left: the error at the most positions against draws and entries; right: against the number of positions."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    colours = {"sampled": "#2a78d6", "topk": "#d6622a"}
    names = {"sampled": "sampled", "topk": "top K and tail"}
    positions = found["topk", TOP_KS[0]][-1][0]
    for kind, numbers in (("sampled", DRAWS), ("topk", TOP_KS)):
        left.plot(numbers, [found[kind, n][-1][1] for n in numbers], "o-", color=colours[kind], label=names[kind])
    left.set(xscale="log", yscale="log", xlabel="draws D, entries K", ylabel="error of the head's gradient")
    left.set_title(f"over {positions:,} positions", fontsize=10)
    left.legend(frameon=False)
    for kind, numbers in (("sampled", SHOWN_DRAWS), ("topk", SHOWN_TOP_KS)):
        for style, number in zip(("-", "--", ":"), numbers, strict=False):
            at, errors = zip(*found[kind, number], strict=True)
            right.plot(at, errors, style, color=colours[kind], label=f"{names[kind]}, {number}")
    right.set(xscale="log", xlabel="positions")
    right.set_title("noise falls, a bias stays", fontsize=10)
    right.legend(frameon=False, fontsize=8, loc="lower left")
    for axes, ticks in ((left, TOP_KS), (right, [at for at, _ in found["topk", TOP_KS[0]]])):
        axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
        axes.set_yticks(errors_shown := [0.05, 0.1, 0.2, 0.4, 0.8], [f"{error:g}" for error in errors_shown])
        axes.minorticks_off()
        axes.set_ylim(bottom=0.03)  # room for the legend
        axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def main() -> None:
    """Print a Markdown table; draw the plot where --plot says."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--teacher", type=Path, help="The teacher's folder, where the run's config has none.")
    parser.add_argument("--sequences", type=int, default=3)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--plot", type=Path)
    arguments = parser.parse_args()
    teacher_dir = arguments.teacher or Path(load_config(arguments.run / "config.yaml").teacher.path)
    teacher, student = (
        read_text(arguments.run, folder, arguments.sequences, arguments.length)
        for folder in (teacher_dir, arguments.run / "pruned")
    )
    found = measure(teacher, student)
    at = [positions for positions, _ in found["topk", TOP_KS[0]]]
    print("| targets | " + " | ".join(f"{n:,} positions" for n in at) + " |\n|---|" + "---|" * len(at))
    for (kind, number), errors in found.items():
        print(f"| {kind} {number} | " + " | ".join(f"{error:.4f}" for _, error in errors) + " |")
    if arguments.plot is not None:
        draw_plot(found, arguments.plot)


if __name__ == "__main__":
    main()
