"""The scores of whole layers (the rows of `kdscale.config.criteria`).

- `block_influence` is collected in the pass that scores the other axes.
- `loss`: L + 1 copies of the hidden states go through the layers side by side. Copy l + 1 starts as the whole model's
  states before layer l, and skips that layer. Each layer is read once; the cost is (L + 1)/2 forward passes and L + 1
  passes of the head. The copies are on disk beyond the memory budget of `scratch`.
- `angular`: arccos(cos)/π between what enters layer l and what enters layer m, the mean over up to 2,048 tokens of all,
  for every pair. One forward pass.

The last two have a pass of their own, which a killed run resumes at the first layer that it had not finished.

L layers · B batch · S sequence · N = B·S tokens · R sampled tokens · D hidden · V vocabulary
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdscale.data.packing import IGNORED_LABEL
from kdscale.errors import DataError
from kdscale.models.hidden_states import HiddenStates, Scratch
from kdscale.models.layer_pass import Advance, LayerPass
from kdscale.models.layer_stream import DecoderLayer, LayerStream, TokenBatch
from kdscale.prune.importance.layer_context import Collector, LayerContext
from kdscale.runtime.ranks import all_reduce_sum, world_size
from kdscale_kernels import linear_sparse_kl

_SAMPLED = 2_048  # tokens a rank with a state kept at every layer: 0.5 GB for 32 layers of 4,096 in bf16


def block_influence(layer: LayerContext) -> Collector:
    """One number: 1 − the mean cosine between what enters the layer and what leaves it."""
    sum_count = torch.zeros(2, dtype=torch.float64)

    def add(before_BSD: Tensor, after_BSD: Tensor) -> None:
        cosine_BS = nn.functional.cosine_similarity(before_BSD.float(), after_BSD.float(), dim=-1)
        sum_count.add_(torch.tensor([float(cosine_BS.double().sum()), cosine_BS.numel()], dtype=torch.float64))

    def influence() -> Tensor:
        total, count = all_reduce_sum(sum_count)
        return 1 - total / count

    layer.watch(add)
    return influence


def losses_without_a_layer(
    stream: LayerStream, batches: Sequence[TokenBatch], advance: Advance | None, scratch: Scratch
) -> Tensor:
    """[L]: rise of the loss without each layer.

    Not negative: if taking some layer out lowers the loss, all values are raised by the largest fall.
    Raises DataError when no token has a next one in its document.
    """
    losses = _losses(stream, batches, advance, scratch)
    rise_L = losses[1:] - losses[0]
    return rise_L - rise_L.min().clamp_max(0.0)


def first_tokens(batches: Sequence[TokenBatch], tokens: int) -> Sequence[TokenBatch]:
    """This rank's share of about `tokens`: whole batches, and at least one."""
    taken: list[TokenBatch] = []
    for batch in batches:
        taken.append(batch)
        if sum(earlier.input_ids_BS.numel() for earlier in taken) * world_size() >= tokens:
            break
    return taken


class Copies:
    """The layers `kept` of a LayerStream, whose batches have `copies` states each: LayerPass spools and resumes all."""

    def __init__(self, stream: LayerStream, kept: Sequence[int], copies: int):
        self.depth, self.device, self.copies = len(kept), stream.device, copies
        self._stream, self._kept = stream, kept

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch) -> HiddenStates:
        states = HiddenStates(scratch, self.device)
        for state_BSD in self._stream.embedded(batches):
            for _ in range(self.copies):
                states.append(state_BSD)
        return states

    def layer(self, index: int) -> DecoderLayer:
        return self._stream.layer(self._kept[index])


def _losses(stream: LayerStream, batches: Sequence[TokenBatch], advance: Advance | None, scratch: Scratch) -> Tensor:
    """Mean next-token loss of the whole model and of the model without each layer, [L + 1] in fp64."""
    copies = Copies(stream, range(stream.depth), stream.depth + 1)
    walk = LayerPass(copies, batches, scratch)
    for layer in walk.layers():
        for index, batch in enumerate(batches):
            first = index * copies.copies
            with torch.inference_mode():
                walk.states[first + layer.index + 1] = walk.states[first]  # it goes on without this layer
                for copy in range(layer.index + 1):
                    walk.states[first + copy] = layer(walk.states[first + copy], batch.position_ids_BS)
            if advance is not None:
                advance(batch.input_ids_BS.numel(), layer.index)
        walk.finish()
    return _head_losses(stream, batches, walk.states, copies.copies)


def _head_losses(stream: LayerStream, batches: Sequence[TokenBatch], states: HiddenStates, copies: int) -> Tensor:
    norm, (head, scale) = stream.final_norm(), stream.output_head()
    sums = torch.zeros(copies + 1, dtype=torch.float64)  # the last one counts tokens
    for index, batch in enumerate(batches):
        labels_N = next_tokens(batch).flatten().to(stream.device)
        sums[-1] += int((labels_N != IGNORED_LABEL).sum())
        for copy in range(copies):
            with torch.inference_mode():
                hidden_ND = norm(stream.stream(states[index * copies + copy])).flatten(0, -2) * scale
            sums[copy] += _cross_entropy(hidden_ND, labels_N, head)
    sums = all_reduce_sum(sums)
    if not sums[-1]:
        raise DataError("the calibration text has no token with a next one", hint="raise importance.seq_len")
    return sums[:-1] / sums[-1]


def _cross_entropy(hidden_ND: Tensor, labels_N: Tensor, head: Any) -> float:
    """Summed over labelled tokens, by the kernel, which never has N × V numbers."""
    ids_N1 = labels_N.clamp_min(0).unsqueeze(1)
    nothing_N1 = hidden_ND.new_zeros(ids_N1.shape, dtype=torch.float32)  # no distillation target: only ce_sum is read
    with torch.no_grad():
        out: Any = linear_sparse_kl(
            hidden_ND, head.weight_VH, ids_N1, nothing_N1, nothing_N1.squeeze(1), labels_N=labels_N,
            ignore_index=IGNORED_LABEL, ce_weight=1.0, bias_V=head.bias_V, softcap=head.softcap,
        )  # fmt: skip
    return float(out.ce_sum)


def next_tokens(batch: TokenBatch) -> Tensor:
    """Labels [B, S]: the next token of the same document, −100 where there is none."""
    labels_BS = torch.full_like(batch.input_ids_BS, IGNORED_LABEL)
    same_document = batch.position_ids_BS[:, 1:] != 0
    labels_BS[:, :-1] = batch.input_ids_BS[:, 1:].where(same_document, torch.tensor(IGNORED_LABEL))
    return labels_BS


def angular_distances(
    stream: LayerStream, batches: Sequence[TokenBatch], advance: Advance | None, scratch: Scratch
) -> Tensor:
    """[L, L + 1]: from what enters layer l to what enters layer m, 0 for m ≤ l; column L is what leaves the model."""
    layers, tokens = stream.dims.layers, sum(batch.input_ids_BS.numel() for batch in batches)
    walk = LayerPass(stream, batches, scratch, advance)
    for layer in walk.layers():
        walk.running[f"entered-{layer.index}"] = stream.stream(_sampled(walk.states, tokens)).contiguous()
        walk.run(layer)
        after_RD = stream.stream(_sampled(walk.states, tokens))
        sums_L = torch.zeros(layers + 1, dtype=torch.float64)  # from each layer's input; the last one counts
        for start in range(layer.index + 1):
            sums_L[start] = _angle_sum(walk.running[f"entered-{start}"], after_RD)
        sums_L[-1] = len(after_RD)
        sums_L = all_reduce_sum(sums_L)
        walk.finish({"to": sums_L[:-1] / sums_L[-1]})
    columns = [torch.zeros(layers, dtype=torch.float64), *(result["to"] for result in walk.results)]
    return torch.stack(columns, dim=1)


def _sampled(states: HiddenStates, tokens: int) -> Tensor:
    """Hidden states of up to `_SAMPLED` of all `tokens`, evenly spaced, [R, D]: the same tokens at every layer."""
    step, seen, picked = max(1, -(-tokens // _SAMPLED)), 0, list[Tensor]()
    for state_BSD in states:
        flat_ND = state_BSD.flatten(0, 1)
        picked.append(flat_ND[-seen % step :: step])
        seen += len(flat_ND)
    return torch.cat(picked)


def _angle_sum(before_RD: Tensor, after_RD: Tensor) -> float:
    cosine_R = nn.functional.cosine_similarity(before_RD.float(), after_RD.float(), dim=-1)
    return float(cosine_R.clamp(-1.0, 1.0).double().arccos().sum() / torch.pi)
