"""A walk through a model, one layer in memory at a time; after a kill it goes on at the last layer that it saved.

Whatever embeds batches and gives layers can be walked (`LayerSource`): a model read from its files, a teacher and its
student side by side, several copies of one model.

The hidden states of a large model are gigabytes, and flushing them can take as long as the layer did. So a save comes
after every layer only where it is cheap; otherwise it waits until the work since the last one has taken ten times as
long as that did. The layers in between are run again after a kill, with the same results. A signal that arrives while
there are such layers waits for the end of the one under way, and for a save; any other acts at once.

Files in the scratch folder, for the layers done when it was saved (k of them):
  states-<k>.bin             those of the hidden states that leave layer k−1 that changed since the save before, raw
  running-<k>.safetensors    sums over the layers so far
  layer-<i>.safetensors      the result of layer i, for each i < k
  progress-<k>.json          which states-<j>.bin each state is in, and which sums were on the CPU; written last: only
                             then is the set complete

B batch · S sequence · D hidden · N tokens · U inputs of a module
"""

from __future__ import annotations

import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence, Set
from contextlib import ExitStack, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from torch import Tensor, nn

from kdscale.errors import Interrupted
from kdscale.files import atomic_path, read_json, read_own_json, write_json
from kdscale.models.hidden_states import IN_MEMORY, HiddenStates, Scratch
from kdscale.models.layer_stream import TokenBatch
from kdscale.runtime import ranks
from kdscale.runtime.progress import Bar
from kdscale.runtime.signals import StopRequest, watch_signals

_VERSION = 2
_CHEAP_BYTES = 1 << 26  # a second on a slow disk
_WORK_PER_SAVE = 10  # so that saving takes a tenth of the time at most


class Layer(Protocol):
    """One layer of a model with its weights in memory, until it is released."""

    @property
    def index(self) -> int: ...

    # positions may be on the host
    def __call__(self, hidden_BSD: Tensor, position_ids_BS: Tensor, /) -> Tensor: ...

    def release(self) -> None: ...


Layer_co = TypeVar("Layer_co", bound=Layer, covariant=True)


class LayerSource(Protocol[Layer_co]):
    """A model of `depth` layers whose weights and hidden states are on `device`."""

    @property
    def depth(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch, /) -> HiddenStates:
        """What enters the first layer: one tensor a batch, or several where whoever walks runs the layers alone."""

    def layer(self, index: int, /) -> Layer_co:
        """Layer `index`; the one before it is released by then."""


Advance = Callable[[float, int], None]  # (tokens of a batch, index of the layer that it went through)


def layer_progress(bar: Bar, depth: int) -> Advance:
    """Moves `bar`, whose total is the tokens of one pass, by each batch's share in each of `depth` layers."""
    return lambda tokens, layer: bar.advance(tokens / depth, f"layer {layer + 1}/{depth}")


class LayerPass(Generic[Layer_co]):
    """The calibration batches carried through a model's layers in order; one layer in memory at a time.

        walk = LayerPass(source, batches, scratch)
        for layer in walk.layers():            # from the first unfinished one on
            ...register hooks on the layer...
            walk.run(layer)                    # every batch through it
            walk.finish({"score": ...})        # its result is kept; a kill from here on may resume with the next layer
        walk.results                           # one dict per layer, also of those done by a killed process

    `running` holds tensors that belong to no one layer, such as sums over the layers: fill it between `layers` and
    `finish`; after a kill it has what it had when the last layer was finished, each tensor on the device where it was.

    With several ranks each has batches and a scratch folder of its own; a kill leaves all of them at the same layer.
    `advance` is called after every batch.
    """

    def __init__(
        self,
        source: LayerSource[Layer_co],
        batches: Sequence[TokenBatch],
        scratch: Scratch = IN_MEMORY,
        advance: Advance | None = None,
    ):
        self.source, self.batches = source, batches
        self.results: list[dict[str, Tensor]] = []
        self.running: dict[str, Tensor] = {}
        self._scratch, self._advance = scratch, advance
        self._saved_at, self._save_seconds = time.monotonic(), 0.0
        self._deferral, self._deferring, self._stop = ExitStack(), False, StopRequest()
        done = ranks.all_reduce_min(max(self._finished(), default=0))
        if done:
            self._resume(done)
        else:
            self._clear()
            self.states: HiddenStates = source.embed(batches, scratch)

    @property
    def done(self) -> int:
        """How many layers are finished."""
        return len(self.results)

    def layers(self, stop: int | None = None) -> Iterator[Layer_co]:
        """The unfinished layers below `stop` in order; each is released when the next one is asked for."""
        with self._deferral:
            for index in range(self.done, self.source.depth if stop is None else stop):
                layer = self.source.layer(index)
                yield layer
                layer.release()
                assert self.done == index + 1, "finish() was not called"
        self._pass_signal_on()

    def run(self, layer: Layer, see: Callable[[Tensor, Tensor], None] | None = None) -> None:
        """Send every batch through `layer`; `see(before_BSD, after_BSD)` is shown what goes in and what comes out."""
        for index, batch in enumerate(self.batches):
            with torch.inference_mode():
                before_BSD = self.states[index]
                after_BSD = layer(before_BSD, batch.position_ids_BS)
                if see is not None:
                    see(before_BSD, after_BSD)
            self.states[index] = after_BSD
            if self._advance is not None:
                self._advance(batch.input_ids_BS.numel(), layer.index)

    def show(self, layer: Layer) -> None:
        """Send every batch through `layer` for the sake of its hooks: what goes in stays the pass's hidden state."""
        for index, batch in enumerate(self.batches):
            with torch.inference_mode():
                layer(self.states[index], batch.position_ids_BS)
            if self._advance is not None:
                self._advance(batch.input_ids_BS.numel(), layer.index)

    def finish(self, result: dict[str, Tensor] | None = None) -> None:
        """Keep the result of the layer that was run last, and save how far the pass is, if that is due.

        Raises Interrupted on all ranks when one of them got a signal since the last save.
        """
        from safetensors.torch import save_file

        self.results.append({name: value.detach().cpu().contiguous() for name, value in (result or {}).items()})
        done = self.done
        if self._scratch.folder is None:
            return
        with atomic_path(self._file(f"layer-{done - 1}.safetensors")) as tmp:
            save_file(self.results[-1], tmp)
        answers = ranks.gather([self._save_is_due(), self._stop.signum])
        signum = next((signum for _, signum in answers if signum), 0)
        if answers[0][0] or signum:  # rank 0's clock
            self._save(done)
            self._deferral.close()
            if signum:
                raise Interrupted(signum, f"after layer {done}, which is saved")
            self._pass_signal_on()
        elif not self._deferring:
            self._stop = self._deferral.enter_context(watch_signals())
            self._deferring = True

    def _pass_signal_on(self) -> None:
        """After the deferral: let a signal that came since all ranks were asked act as it would now."""
        signum, self._stop, self._deferring = self._stop.signum, StopRequest(), False
        if signum:
            signal.raise_signal(signum)

    def _save_is_due(self) -> bool:
        """See the top."""
        elapsed = time.monotonic() - self._saved_at
        return self.states.changed_bytes <= _CHEAP_BYTES or elapsed >= _WORK_PER_SAVE * self._save_seconds

    def _save(self, done: int) -> None:
        """Put on the disk what a resume needs after `done` layers, then remove what it no longer needs."""
        from safetensors.torch import save_file

        began = time.monotonic()
        if self.running:
            with atomic_path(self._file(f"running-{done}.safetensors")) as tmp:
                save_file(self.running, tmp)
        tensors = self.states.save(self._file(f"states-{done}.bin"))
        on_cpu = sorted(name for name, tensor in self.running.items() if tensor.device.type == "cpu")
        progress = {"version": _VERSION, "states": tensors, "on_cpu": on_cpu}
        write_json(self._file(f"progress-{done}.json"), progress)
        ranks.barrier()  # the files of the save before may go once every rank has these
        self._keep_only(done, tensors)
        self._saved_at = time.monotonic()
        self._save_seconds = self._saved_at - began

    def close(self) -> None:
        """Remove the files; the results stay."""
        self._clear()

    def _finished(self) -> list[int]:
        """For how many layers there is a complete set of files."""
        folder = self._scratch.folder
        if folder is None or not folder.exists():
            return []
        matches = (re.fullmatch(r"progress-(\d+)\.json", item.name) for item in folder.iterdir())
        done = [int(match[1]) for match in matches if match]
        return [number for number in done if read_own_json(self._file(f"progress-{number}.json"), _is_progress)]

    def _resume(self, done: int) -> None:
        from safetensors.torch import load_file

        assert self._scratch.folder is not None
        progress = read_json(self._file(f"progress-{done}.json"))
        self.results = [load_file(self._file(f"layer-{index}.safetensors")) for index in range(done)]
        if self._file(f"running-{done}.safetensors").exists():
            saved = load_file(self._file(f"running-{done}.safetensors"))
            on_cpu = progress["on_cpu"]
            self.running = {name: t if name in on_cpu else t.to(self.source.device) for name, t in saved.items()}
        self.states = HiddenStates.load(self._scratch.folder, progress["states"], self._scratch, self.source.device)
        self._keep_only(done, progress["states"])

    def _file(self, name: str) -> Path:
        assert self._scratch.folder is not None
        return self._scratch.folder / name

    def _keep_only(self, done: int, tensors: Sequence[dict[str, Any]]) -> None:
        """Remove the files of other saves; `tensors`: the states of the one after `done` layers."""
        kept = {f"progress-{done}.json", f"running-{done}.safetensors", *(tensor["file"] for tensor in tensors)}
        self._unlink(kept, "progress-*.json", "running-*.safetensors", "states-*.bin")

    def _clear(self) -> None:
        self._unlink(set(), "progress-*.json", "running-*.safetensors", "states-*.bin", "spool.bin", "layer-*")

    def _unlink(self, kept: Set[str], *patterns: str) -> None:
        """Progress goes first: it says that the others are there."""
        folder = self._scratch.folder
        for item in (item for pattern in patterns if folder is not None for item in folder.glob(pattern)):
            if item.name not in kept:
                item.unlink()


def _is_progress(value: object) -> bool:
    if not isinstance(value, dict) or value.get("version") != _VERSION:
        return False
    return "states" in value and isinstance(value.get("on_cpu"), list)


def add_product(total_AB: Tensor | None, a_NA: Tensor, b_NB: Tensor) -> Tensor:
    """`total_AB` (None: zeros) plus aᵀb, in fp32 and in place: how Gram matrices are summed over tokens.

    Where `b` is in bf16 a CPU multiplies in bf16 and adds in fp32, twice as fast: the products of bf16 values are exact
    in fp32, so that a Gram matrix is what it was; an `a` in fp32 is rounded to bf16, token by token.
    """
    if total_AB is None:
        total_AB = torch.zeros(a_NA.shape[1], b_NB.shape[1], device=a_NA.device)
    a_float = a_NA.float()
    with _multiply_in_bf16() if b_NB.dtype == torch.bfloat16 and not b_NB.is_cuda else nullcontext():
        return total_AB.addmm_(a_float.T, a_float if b_NB is a_NA else b_NB.float())


@contextmanager
def _multiply_in_bf16() -> Iterator[None]:
    """Let oneDNN round the factors of fp32 matrix products to bf16; a processor without bf16 works as before."""
    settings: Any = getattr(torch.backends.mkldnn, "matmul", None)  # torch 2.9 has it
    if settings is None:
        yield
        return
    before = settings.fp32_precision
    settings.fp32_precision = "bf16"
    try:
        yield
    finally:
        settings.fp32_precision = before


class GramHooks:
    """Σ xᵀx [U, U] in fp32 of what modules read, by name, over the batches that pass while the hooks are there."""

    def __init__(self) -> None:
        self.grams: dict[str, Tensor] = {}
        self._handles: list[Any] = []

    def attach(self, name: str, module: nn.Module) -> None:
        """Sum what `module` reads from now on under `name`."""

        def see(_module: Any, args: tuple[Tensor, ...]) -> None:
            x_NU = args[0].flatten(0, -2)
            self.grams[name] = add_product(self.grams.get(name), x_NU, x_NU)

        self._handles.append(module.register_forward_pre_hook(see))

    def detach(self) -> None:
        """Take the hooks away; the sums stay."""
        for handle in self._handles:
            handle.remove()
