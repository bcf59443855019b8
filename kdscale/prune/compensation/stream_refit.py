"""Refit all that reads and writes the residual stream to a narrower stream (`hidden_method: refit`).

The start is the teacher folded into the directions that stay (stream_cut.py). Teacher and student run side by side, a
layer at a time, as in two_stream.py, and each sublayer is solved for in two regressions. With ẑ what the student's norm
makes of the narrow stream, of the student's own (z) and of what it would be if every sublayer added what the teacher's
adds (z* = z_0 + P (x − x_0); the embeddings z_0 of a tied student are not P x_0):

    readers (q, k, v, gate, up):  W' = argmin ‖ẑ_T W'ᵀ − W g x̂‖² + ‖ẑ_S W'ᵀ − W g x̂‖² + λ‖W' − W_start‖²
    writers (o, down):            W' = argmin ‖u_T W'ᵀ − P y‖² + ‖u_S W'ᵀ − (P y + β(z* − z))‖² + λ‖W' − W_start‖²

u is what the writer reads, y what the teacher adds to its stream x. Readers come first: no gain or rotation has to be
exact that a regression on what the norm really puts out makes up for.

Where a norm stands between the sublayer and the stream (Gemma 2 and 3), the writer's outputs are divided by gains g'
first, and the norm multiplies them again. It gives every token one size, so the writer has only the direction to get
right: its equations have u / rms(u W_startᵀ), by which the norm will divide, in place of u. Without that a regression
spends itself on sizes that the norm takes away again (Gemma 3 270M, 640 → 512, 6,144 tokens: 9.2 times the teacher's
perplexity in place of 5.5). g' starts as gain_fits.py says; when the writer is solved it is fitted once more, channel
by channel, to what the norm puts out. The final norm's gain comes last (gain_fits.py).

B batch · S sequence · D teacher's hidden · H student's hidden · U inputs of a writer · K kept ones
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdscale.config.prune import PruneConfig
from kdscale.families import TensorSpec
from kdscale.models.hidden_states import IN_MEMORY, HiddenStates, Scratch
from kdscale.models.layer_pass import LayerPass, layer_progress
from kdscale.models.layer_stream import DecoderLayer, EnoughSeenError, LayerStream, TokenBatch
from kdscale.prune.compensation.gain_fits import SublayerSizes, fitted_final_norm
from kdscale.prune.compensation.post_norm import norm_epsilon, root_mean_square
from kdscale.prune.compensation.readers import RIDGE, ReaderMap, mapped, module_path, readers_of, token_weights
from kdscale.prune.compensation.recovered_error import InputSample, RecoveredErrors
from kdscale.prune.compensation.regression import TargetSums
from kdscale.prune.compensation.two_stream import embedded_pairs
from kdscale.prune.slicing import NORM_BEFORE, SlicedTensor
from kdscale.prune.stream_cut import POST_NORM, WRITER, CutStudent
from kdscale.runtime.progress import Reporter
from kdscale.runtime.ranks import all_reduce_sum, is_writer

FINAL_NORM = "final_norm"


def refitted_layers(
    stream: LayerStream,
    start: CutStudent,
    batches: Sequence[TokenBatch],
    cfg: PruneConfig,
    reporter: Reporter,
    scratch: Scratch = IN_MEMORY,
    recovered: RecoveredErrors | None = None,
) -> Iterator[tuple[int | None, dict[str, Tensor]]]:
    """Yield (the student's layer, role → weight) layer by layer and (None, the final norm's weight) at the end.

    Weights are as they are on disk, fp32 on the CPU. On the same terms as `one_stream.compensated_layers`; in memory a
    layer of each model, one regression, and the hidden states of both within the budget of `scratch`. Raises
    SelfCheckError when a regression is not finite.
    """
    plan = start.slicer.plan
    tokens = sum(batch.input_ids_BS.numel() for batch in batches)
    depth = plan.kept.layers[-1] + 1
    with reporter.bar("compensation", total=tokens) as bar:
        source = _Pair(stream, start)
        walk = LayerPass(source, batches, scratch, layer_progress(bar, depth))
        for layer in walk.layers(depth):
            if layer.position is not None:
                with torch.inference_mode():
                    solved = layer.refit(walk.states, batches, cfg, recovered)
                if is_writer():
                    yield layer.position, solved
                del solved
            walk.run(layer)
            walk.finish()
        with torch.inference_mode():
            final = fitted_final_norm(stream, source.student, start, walk.states, batches)
        if is_writer():
            yield None, {FINAL_NORM: final}
        walk.close()


class _Pair:
    """Teacher and student as one LayerSource: a token's state is the teacher's D numbers, the student's H, and by how
    much the student's embedding differs from the teacher's cut to H."""

    def __init__(self, stream: LayerStream, start: CutStudent):
        self.depth, self.device, self._start, self._teacher = stream.depth, stream.device, start, stream
        slicer = start.slicer
        self.student = LayerStream(
            slicer.student_config, slicer.family, start.tensor, dtype=stream.dtype, device=stream.device
        )
        hidden = slicer.plan.student.hidden
        self._sizes = [slicer.plan.teacher.hidden, hidden, hidden]

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch) -> HiddenStates:
        states, rows_HD = HiddenStates(scratch, self.device), self._start.basis.rows_HD.to(self.device).float()
        for teacher_BSD, student_BSH in embedded_pairs(self._teacher, self.student, batches, scratch):
            with torch.inference_mode():
                differs_BSH = (student_BSH.float() - teacher_BSD.float() @ rows_HD.T).to(student_BSH.dtype)
                states.append(torch.cat([teacher_BSD, student_BSH, differs_BSH], dim=-1))
        return states

    def layer(self, index: int) -> _PairOfLayers:
        kept = self._start.slicer.plan.kept.layers
        position = kept.index(index) if index in kept else None
        student = None if position is None else self.student.layer(position)
        return _PairOfLayers(self._teacher.layer(index), student, self._start, position, self._sizes)


class _Watched:
    """A layer whose modules are found by role, with what they read and put out in its last pass."""

    def __init__(self, layer: DecoderLayer, origins: Sequence[tuple[str, TensorSpec]], prefix: str):
        self.layer, self.specs = layer, {spec.role: spec for _, spec in origins}
        self._inputs: dict[str, Tensor] = {}
        self._outputs: dict[str, Tensor] = {}
        self._until = ""
        self._handles = []
        self._paths = {
            role: module_path(spec, prefix) for role, spec in self.specs.items() if not role.endswith("_bias")
        }
        for role in self._paths:
            self._handles.append(self.module(role).register_forward_hook(self._recorder(role)))

    def module(self, role: str) -> Any:
        return self.layer.site(self._paths[role])

    def run(self, state_BSD: Tensor, positions_BS: Tensor, until: str) -> None:
        """Run the layer as far as the output of the module `until`."""
        self._until = until
        self.layer.look(state_BSD, positions_BS)
        self._until = ""

    def read(self, role: str) -> Tensor:
        return self._inputs[role]

    def put_out(self, role: str) -> Tensor:
        return self._outputs[role]

    def forget(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._inputs.clear()
        self._outputs.clear()

    def _recorder(self, role: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def record(_module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            self._inputs[role], self._outputs[role] = args[0], output
            if role == self._until:
                raise EnoughSeenError

        return record


class _PairOfLayers:
    """One layer of the teacher and, if it is kept, the student's at the same place (`position`)."""

    def __init__(
        self,
        teacher: DecoderLayer,
        student: DecoderLayer | None,
        start: CutStudent,
        position: int | None,
        sizes: list[int],
    ):
        self.index, self.position = teacher.index, position
        self._teacher_layer, self._student_layer, self._sizes, self._start = teacher, student, sizes, start

    def __call__(self, both: Tensor, positions_BS: Tensor) -> Tensor:
        teacher, student, differs = both.split(self._sizes, dim=-1)
        after = student if self._student_layer is None else self._student_layer(student, positions_BS)
        return torch.cat([self._teacher_layer(teacher, positions_BS), after, differs], dim=-1)

    def release(self) -> None:
        self._teacher_layer.release()
        if self._student_layer is not None:
            self._student_layer.release()

    def refit(
        self,
        states: HiddenStates,
        batches: Sequence[TokenBatch],
        cfg: PruneConfig,
        recovered: RecoveredErrors | None,
    ) -> dict[str, Tensor]:
        """Solve for both sublayers; role → weight as it is on disk. The student's layer has them from then on."""
        assert self._student_layer is not None and self.position is not None
        slicer = self._start.slicer
        origins = {tensor.spec.role: tensor for tensor in slicer.layer(self.position)}
        specs = [(tensor.source, tensor.spec) for tensor in origins.values()]
        prefix = slicer.family.layer_prefix(self.index)
        pair = (_Watched(self._teacher_layer, specs, prefix), _Watched(self._student_layer, specs, prefix))
        out: dict[str, Tensor] = {}
        for component in NORM_BEFORE:
            sublayer = _Sublayer(component, *pair, self._start, origins, self._sizes)
            out |= sublayer.refit(states, batches, cfg, recovered, self.index)
        for watched in pair:
            watched.forget()
        return out


class _Sublayer:
    """The regressions of one sublayer (`component`), in the order in which its weights act."""

    def __init__(
        self,
        component: str,
        teacher: _Watched,
        student: _Watched,
        start: CutStudent,
        origins: dict[str, SlicedTensor],
        sizes: list[int],
    ):
        self._teacher, self._student, self._start, self._origins, self._sizes = teacher, student, start, origins, sizes
        self._norm, self._writer = NORM_BEFORE[component], WRITER[component]
        self._post = POST_NORM[component] if POST_NORM[component] in origins else None
        self._added = self._post or self._writer  # whose output goes into the stream
        self._readers = list(readers_of(component, {role: origin.spec for role, origin in origins.items()}))
        self._rows_HD = start.basis.rows_HD.to(next(student.layer.module.parameters()).device)
        self._position = origins[self._norm].position

    def refit(
        self,
        states: HiddenStates,
        batches: Sequence[TokenBatch],
        cfg: PruneConfig,
        recovered: RecoveredErrors | None,
        layer: int,
    ) -> dict[str, Tensor]:
        pairs = [(index, batch.position_ids_BS) for index, batch in enumerate(batches)]
        where = f"the student's layer {self._position}"
        out = self._refit_readers(states, pairs, RIDGE * cfg.ridge_lambda, where)
        out[self._writer] = self._refit_writer(states, pairs, cfg, where, recovered, layer)
        if self._post is not None:
            out[self._post] = self._refit_post_norm(states, pairs, cfg.stream_correction)
        return {role: weight.float().cpu() for role, weight in out.items()}

    def _refit_readers(
        self, states: HiddenStates, pairs: list[tuple[int, Tensor]], ridge: float, where: str
    ) -> dict[str, Tensor]:
        start_DH = self._start.reader_map(self._norm, self._teacher.layer.index).to(self._rows_HD.device)
        sums = ReaderMap(start_DH.float())
        sizes = SublayerSizes(len(self._rows_HD), self._rows_HD.device) if self._post else None
        for index, positions_BS in pairs:
            teacher, student, differs = states[index].split(self._sizes, dim=-1)
            self._teacher.run(teacher, positions_BS, self._added if sizes else self._norm)
            self._student.run(student, positions_BS, self._norm)
            own, meant = self._student.put_out(self._norm).float(), self._teacher.put_out(self._norm).float()
            cut = self._normalised(self._cut(self._teacher.read(self._norm)) + differs.float()).float()
            weight = token_weights(positions_BS, own.device)
            sums.add(cut * weight, meant * weight)
            sums.add(own * weight, meant * weight)
            if sizes is not None:
                sizes.add(self._cut(self._teacher.put_out(self._added)))
        map_DH = sums.solve(ridge, f"{self._norm} of {where}")
        out: dict[str, Tensor] = {}
        for role in self._readers:
            source = self._teacher.module(role).weight
            rows = self._start.slicer.kept(self._origins[role].spec.axes[0], self._position)
            source = source if rows is None else source[torch.tensor(rows, device=source.device)]
            out[role] = mapped(source, map_DH)
            module = self._student.module(role)
            module.weight.data = out[role].to(module.weight)
        if sizes is not None:
            self._set_gain(sizes.gain())
        return out

    def _normalised(self, state: Tensor) -> Tensor:
        """What the student's norm makes of a state, without the hooks."""
        module: Any = self._student.module(self._norm)
        out: Tensor = module.forward(state.to(self._student.read(self._norm).dtype))
        return out

    def _refit_writer(
        self,
        states: HiddenStates,
        pairs: list[tuple[int, Tensor]],
        cfg: PruneConfig,
        where: str,
        recovered: RecoveredErrors | None,
        layer: int,
    ) -> Tensor:
        module, teacher_module = self._student.module(self._writer), self._teacher.module(self._writer)
        gain_H, bias = self._gain(), getattr(module, "bias", None)
        offset = 0.0 if bias is None else bias.float()
        weight_HU = self._cut_writer(teacher_module.weight, gain_H)
        slicer, axis = self._start.slicer, self._origins[self._writer].spec.axes[-1]
        inputs_K = slicer.indices(axis, self._position, weight_HU.device)
        start_HK = weight_HU[:, inputs_K]
        sums, sample = TargetSums(start_HK), InputSample(len(pairs))
        for index, positions_BS in pairs:
            teacher, student, differs = states[index].split(self._sizes, dim=-1)
            self._teacher.run(teacher, positions_BS, self._added)
            self._student.run(student, positions_BS, self._writer)
            added, target = self._targets(cfg.stream_correction, differs)
            read, own = self._teacher.read(self._writer), self._student.read(self._writer)
            sample.add(read)
            weight = token_weights(positions_BS, read.device)
            of_read, of_own = weight / self._divisor(read, weight_HU), weight / self._divisor(own, start_HK)
            sums.add(read[..., inputs_K] * of_read, (added / gain_H - offset) * weight)
            sums.add(own * of_own, (target / gain_H - offset) * weight)
        sums.reduce()
        solved_HK = sums.solve(cfg.ridge_lambda, f"{self._writer} of {where}")
        if recovered is not None and slicer.cuts(axis):
            recovered.add(layer, self._writer, sample, weight_HU, inputs_K, solved_HK)
        module.weight.data = solved_HK.to(module.weight)
        return solved_HK

    def _divisor(self, read: Tensor, weight: Tensor) -> Tensor:
        """What the norm behind the writer divides by when the writer has this weight: [B, S, 1]; 1 without a norm."""
        if self._post is None:
            return read.new_ones(())
        epsilon = norm_epsilon(self._student.module(self._post))
        return root_mean_square(read.float() @ weight.T, epsilon)

    def _targets(self, beta: float, differs: Tensor) -> tuple[Tensor, Tensor]:
        """What the teacher adds, cut, and what the student is to add: [B, S, H] each, for the batch run last."""
        added = self._cut(self._teacher.put_out(self._added))
        meant = self._cut(self._teacher.read(self._norm)) + differs.float()
        behind = meant - self._student.read(self._norm).float()
        return added, added + beta * behind

    def _refit_post_norm(self, states: HiddenStates, pairs: list[tuple[int, Tensor]], beta: float) -> Tensor:
        gain_H = self._gain()
        size_H, product_H = torch.zeros_like(gain_H), torch.zeros_like(gain_H)
        for index, positions_BS in pairs:
            teacher, student, differs = states[index].split(self._sizes, dim=-1)
            self._teacher.run(teacher, positions_BS, self._added)
            self._student.run(student, positions_BS, self._added)
            plain = self._student.put_out(self._added).float() / gain_H
            target = self._targets(beta, differs)[1]
            size_H += plain.square().flatten(0, -2).sum(0)
            product_H += (plain * target).flatten(0, -2).sum(0)
        size_H, product_H = all_reduce_sum(size_H), all_reduce_sum(product_H)
        return self._set_gain(torch.where(size_H > 0, product_H / size_H.clamp_min(1e-30), gain_H))

    def _gain(self) -> Tensor:
        """Of the norm behind the sublayer, fp32 [H]; ones where there is none."""
        if self._post is None:
            return torch.ones(len(self._rows_HD), device=self._rows_HD.device)
        return self._start.as_gain(self._student.module(self._post).weight.float())

    def _set_gain(self, gain_H: Tensor) -> Tensor:
        """Put it into the student's norm; returns the weight. Near zero the way back would not be finite."""
        small = 1e-6 * gain_H.abs().max()
        weight_H = self._start.as_weight(torch.where(gain_H.abs() < small, small, gain_H))
        module = self._student.module(str(self._post))
        module.weight.data = weight_H.to(module.weight)
        return weight_H

    def _cut_writer(self, weight_DU: Tensor, gain_H: Tensor) -> Tensor:
        if self._post is not None:
            post = self._start.as_gain(self._teacher.module(self._post).weight.double())
            weight_DU = post[:, None] * weight_DU
        return ((self._rows_HD @ weight_DU.double()) / gain_H[:, None]).float()

    def _cut(self, stream: Tensor) -> Tensor:
        """P x, fp32."""
        return stream.float() @ self._rows_HD.T.float()
