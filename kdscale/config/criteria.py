"""The criteria that rank what pruning keeps: one row a criterion, with its paper.

Everything else reads this table: the methods that the config accepts, what the importance stage measures, the unit
written beside the scores, the ranking, the predicted damage and the docs. A new criterion is one row here and the
function that `collect` names. The table is here because the config cannot import `kdscale.prune`; for the same reason
`collect` is a name, which the importance stage looks up. Nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Annotated, Literal

from pydantic import AfterValidator

# Energies add up: the share of a set of units is their sum over the sum of all. Norms are square roots of energies.
Unit = Literal["energy", "norm"]

# Axes that a model may have besides, each with the axis that it is cut with, by the same share and the same criteria:
# ffn units of layers without experts in a mixture that has such layers, and of the expert that every token goes to.
FOLLOWED = {"dense_ffn": "ffn", "shared_ffn": "ffn"}


@dataclass(frozen=True)
class Criterion:
    """One way to score the units of one axis; the larger score stays."""

    axis: str
    method: str
    _: KW_ONLY
    title: str  # what is scored, in one line
    source: str  # the paper, or where the choice was measured
    unit: Unit = "energy"
    # "module:function". The function is given a LayerContext before each layer runs and returns a Collector, or None
    # where the criterion does not apply. With `own_pass` it is given (stream, batches, advance, scratch) and returns
    # the scores of all layers. None: the criterion needs no scores.
    collect: str | None
    # "module:function" that turns the sum over all norms into named arrays; for the hidden axis, which has one order
    # for the whole model. None: the sum is the score.
    finish: str | None = None
    needs_gram: bool = False  # needs the Gram matrix of a sublayer's whole input: measured only if the config asks
    own_pass: bool = False  # needs a pass of its own through the model: measured only if the config asks
    scores_blocks: bool = False  # [L, L + 1]: entry (l, m) scores the block of layers l to m - 1, dropped as one
    # [L]: the rise of log-perplexity by the time that the layer goes, after all that have less; `collect` is also given
    # how many layers may go
    in_order: bool = False
    # Rise of log-perplexity for a lost share of 1, where it differs from the axis' usual one (prune/search/scoring.py).
    damage: float | None = None

    @property
    def name(self) -> str:
        """The array's name among the importance scores, `axis.method`."""
        return f"{self.axis}.{self.method}"

    @property
    def names(self) -> tuple[str, ...]:
        """`name`, and the names of the scores of axes that follow the axis, by the same method."""
        followers = (axis for axis, leader in FOLLOWED.items() if leader == self.axis)
        return (self.name, *(self.name_of(axis) for axis in followers))

    def name_of(self, axis: str) -> str:
        """The array's name for `axis`, the criterion's own or one that follows it."""
        return f"{axis}.{self.method}"

    @property
    def on_request(self) -> bool:
        """Whether it is expensive, and so measured only when the config ranks by it."""
        return self.needs_gram or self.own_pass


# A share of 1 of the layers' importance is lost at so many nats: no better than chance.
LAYERS_IN_ORDER_DAMAGE = 10.0

_UNITS = "kdscale.prune.importance.unit_scores"
_LAYERS = "kdscale.prune.importance.layer_scores"
_HIDDEN = "kdscale.prune.importance.hidden_scores"
_MINITRON = "Minitron, arXiv 2407.14679, section 2.2"
_WANDA = "after Wanda, arXiv 2306.11695, for whole units"
_MINITRON_HYBRID = "Minitron for hybrids, arXiv 2504.11409: heads are ranked within their group"
_OBS = "Optimal Brain Surgeon: Hassibi and Stork 1993; SparseGPT, arXiv 2301.00774"

# The first row of an axis is what ranks it where the config has no choice.
CRITERIA: tuple[Criterion, ...] = (
    Criterion("ffn", "output_energy", collect=f"{_UNITS}:ffn_output_energy", source=_WANDA,
              title="Σ over tokens of ‖W_unit · x_unit‖², the unit's share of the sublayer's output"),
    Criterion("ffn", "activation", unit="norm", collect=f"{_UNITS}:ffn_activation", source=_MINITRON,
              title="mean of |x| over the sequence, L2 norm over the samples"),
    Criterion("ffn", "obs", needs_gram=True, collect=f"{_UNITS}:ffn_removal_costs", source=_OBS,
              title="what removing the unit costs when the other units are refitted"),
    Criterion("heads", "output_energy", collect=f"{_UNITS}:heads_output_energy", source=_WANDA,
              title="Σ over tokens of ‖W_head · x_head‖², the head's share of the sublayer's output"),
    Criterion("heads", "activation", unit="norm", collect=f"{_UNITS}:heads_activation", source=_MINITRON,
              title="mean of ‖x_head‖ over the sequence, L2 norm over the samples"),
    Criterion("heads", "obs", needs_gram=True, collect=f"{_UNITS}:heads_removal_costs", source=_OBS,
              title="what removing the head costs when the other heads are refitted"),
    Criterion("kv_heads", "output_energy", collect=f"{_UNITS}:kv_heads_output_energy", source=_WANDA,
              title="Σ over tokens of ‖W_group · x_group‖² of all query heads that read the kv head"),
    Criterion("hidden", "activation", unit="norm", collect=f"{_HIDDEN}:norm_activation", source=_MINITRON,
              title="mean of |norm output| over the sequence, L2 norm over the samples, summed over the norms"),
    Criterion("hidden", "pca", collect=f"{_HIDDEN}:residual_covariance", finish=f"{_HIDDEN}:components", damage=31.0,
              title="energy along the principal components of the residual stream, which become the channels",
              source="SliceGPT, arXiv 2401.15024, section 3, with one rotation for the whole model"),
    Criterion("hidden", "refit", collect=f"{_HIDDEN}:stream_covariances", finish=f"{_HIDDEN}:directions", damage=11.0,
              title="energy along the same components; the student's stream is cut to the first ones, and all that "
                    "reads and writes it is refitted, so that a tied head stays tied",
              source="measured here (docs/explanation/measured-pruning.md)"),
    Criterion("layers", "one_by_one", own_pass=True, in_order=True, damage=LAYERS_IN_ORDER_DAMAGE,
              collect="kdscale.prune.importance.layer_removal:divergences_one_by_one",
              title="KL divergence, in nats per token, once the layer is dropped: each time the one that costs least",
              source="greedy as SLEB, arXiv 2402.09025, by the distribution, and not by the perplexity"),
    Criterion("layers", "block_influence", collect=f"{_LAYERS}:block_influence",
              title="1 − mean cosine between what enters and what leaves the layer",
              source="ShortGPT, arXiv 2403.03853"),
    Criterion("layers", "loss", own_pass=True, collect=f"{_LAYERS}:losses_without_a_layer",
              title="rise of the loss without the layer, in nats per token",
              source="the perplexity criterion of ShortGPT (arXiv 2403.03853) and LLM-Streamline"),
    Criterion("layers", "angular", own_pass=True, scores_blocks=True, collect=f"{_LAYERS}:angular_distances",
              title="angle between what enters the first and what leaves the last layer of a block",
              source="Gromov et al., arXiv 2403.17887, equation 6, over many tokens of a sequence, not the last alone"),
    Criterion("layers", "spread", collect=None,
              title="no score: layers spread evenly over the depth stay, the first and the last among them",
              source="DistilBERT, arXiv 1910.01108, section 2: every second layer"),
    Criterion("layers", "last", collect=None, title="no score: drops the last layers before the final one",
              source="arXiv 2408.11796, section 3.2"),
    Criterion("experts", "output_norm", unit="norm", collect=f"{_UNITS}:experts_output_norm",
              title="Σ over the expert's tokens of routing weight · ‖expert output‖",
              source="REAP, arXiv 2510.13999, with a sum over the tokens instead of a mean"),
    Criterion("ssm_heads", "output_energy", collect=f"{_UNITS}:ssm_heads_output_energy", source=_WANDA,
              title="Σ over tokens of ‖W_head · x_head‖², the head's share of the mixer's output"),
    Criterion("ssm_heads", "activation", unit="norm", collect=f"{_UNITS}:ssm_heads_activation",
              source=_MINITRON_HYBRID, title="mean of ‖x_head‖ over the sequence, L2 norm over the samples"),
    Criterion("ssm_head_dim", "output_energy", collect=f"{_UNITS}:ssm_channels_output_energy", source=_WANDA,
              title="Σ over tokens and heads of ‖W_channel · x_channel‖², the channel's share of the mixer's output"),
    Criterion("ssm_state", "output_energy", collect=f"{_UNITS}:ssm_state_output_energy",
              title="the output energy of a group's heads, by the channel's share of Σ over tokens of C² · Σ of B²",
              source="made here: a token reads C · B of each token before it"),
)  # fmt: skip

AXIS_TITLES = {
    "layers": "Layers",
    "hidden": "Hidden channels",
    "ffn": "Feed-forward units",
    "heads": "Query heads",
    "kv_heads": "KV heads",
    "experts": "Experts",
    "ssm_heads": "SSM heads",
    "ssm_head_dim": "SSM head channels",
    "ssm_state": "SSM state channels",
}


def methods(axis: str) -> list[str]:
    """The methods that can rank `axis`."""
    return [row.method for row in CRITERIA if row.axis == axis]


def criterion(axis: str, method: str | None = None) -> Criterion:
    """The row for `axis` and `method`; without a method the axis' first row. Raises KeyError for unknown ones."""
    for row in CRITERIA:
        if row.axis == axis and method in (None, row.method):
            return row
    raise KeyError(f"{axis}.{method}")


def _method_of(axis: str, also: Sequence[str] = ()) -> AfterValidator:
    def check(method: str) -> str:
        known = [*also, *methods(axis)]
        if method not in known:
            raise ValueError(f"expected one of {', '.join(known)}")
        return method

    return AfterValidator(check)


# The table is read at validation, so that a row added to it is accepted at once.
FfnMethod = Annotated[str, _method_of("ffn")]
HeadMethod = Annotated[str, _method_of("heads")]
SsmMethod = Annotated[str, _method_of("ssm_heads")]
HiddenMethod = Annotated[str, _method_of("hidden", also=("auto",))]
LayerMethod = Annotated[str, _method_of("layers", also=("auto",))]


def criteria_table() -> str:
    """All criteria as a Markdown table, for the docs."""
    rows = []
    for row in CRITERIA:
        title = row.title.replace("|", "\\|")  # a bare | would begin a new column
        rows.append(f"| {row.axis} | `{row.method}` | {row.unit} | {title} | {row.source} |")
    return "\n".join(["| axis | method | unit | what it is | source |", "|---|---|---|---|---|", *rows]) + "\n"
