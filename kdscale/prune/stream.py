"""A model run layer by layer, so that no more than one layer (or the embedding) is in memory at a time.

The layers themselves are transformers' own modules: a model of one layer is built on the meta device from the family's
config for just that layer, and given that layer's tensors. Masks, rotary positions and everything else a family does
are therefore the family's, and what is measured here is what the whole model would compute.

B batch · S sequence · D hidden · V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdscale.families import Family
from kdscale.prune.states import IN_MEMORY, Scratch, States


class TokenBatch(Protocol):
    """What a pass needs of a batch; data.loader's batches are such. Positions restart at 0 with every document."""

    @property
    def input_ids_BS(self) -> Tensor: ...  # noqa: N802

    @property
    def position_ids_BS(self) -> Tensor: ...  # noqa: N802


TensorSource = Callable[[str], Tensor]


class OneLayer:
    """One decoder layer with its weights, inside the shell of a whole model that has no other weights."""

    def __init__(self, shell: nn.Module, family: Family, index: int):
        self.index = index
        self._base: Any = shell.get_submodule(shell.base_model_prefix)  # type: ignore[arg-type]
        self.module: nn.Module = shell.get_submodule(f"{family.sites.layers}.0")

    def site(self, path: str) -> nn.Module:
        """A module inside the layer by the family's path, e.g. `mlp.down_proj`."""
        return self.module.get_submodule(path)

    def release(self) -> None:
        """Free the weights now: modules and their hooks are in reference cycles, and wait for the collector."""
        for parameter in self.module.parameters():
            parameter.data = parameter.data.new_empty(0)

    def __call__(self, hidden_BSD: Tensor, position_ids_BS: Tensor) -> Tensor:
        return self._base(
            inputs_embeds=hidden_BSD, position_ids=position_ids_BS, attention_mask=None, use_cache=False
        ).last_hidden_state


class LayerStream:
    """Layer-by-layer access to one model.

    `config` is the model's config.json, `source` gives a tensor by its name on disk (`Checkpoint.tensor`, or slices of
    it). Weights and hidden states are in `dtype` on `device`.
    """

    def __init__(
        self, config: dict[str, Any], family: Family, source: TensorSource, *, dtype: torch.dtype, device: torch.device
    ):
        self.config, self.family, self._source = config, family, source
        self.dtype, self.device = dtype, device
        self.dims = family.dims(config)

    def embedding(self) -> nn.Module:
        """The embedding module alone, with its weight."""
        sites = self.family.sites
        shell = self._shell(0)
        self._fill(shell, {f"{sites.embed}.weight": f"{sites.embed}.weight"}, sites.embed)
        return shell.get_submodule(sites.embed)

    def layer(self, index: int) -> OneLayer:
        """Layer `index` with its tensors just read. `release` it before asking for the next one."""
        shell = self._shell(index)
        sites = self.family.sites
        ours, theirs = self.family.layer_prefix(0), self.family.layer_prefix(index)
        names = {ours + name.removeprefix(theirs): name for name in self.family.layer_tensors(self.config, index)}
        self._fill(shell, names, f"{sites.layers}.0")
        parent, _, leaf = sites.final_norm.rpartition(".")
        setattr(shell.get_submodule(parent), leaf, nn.Identity())  # the hidden state leaves the layer as it is
        shell.get_submodule(sites.rotary).to(self.device)
        return OneLayer(shell, self.family, index)

    def layers(self) -> Iterator[OneLayer]:
        """All layers in order; each is released when the next one is asked for."""
        for index in range(self.dims.layers):
            layer = self.layer(index)
            yield layer
            layer.release()

    def final_norm(self) -> nn.Module:
        sites = self.family.sites
        shell = self._shell(0)
        self._fill(shell, {f"{sites.final_norm}.weight": f"{sites.final_norm}.weight"}, sites.final_norm)
        return shell.get_submodule(sites.final_norm)

    def head(self) -> nn.Module:
        """The output head; under a tie it has the embedding's weight."""
        sites = self.family.sites
        shell = self._shell(0)
        name = f"{sites.head}.weight"
        self._fill(shell, {name: self.family.tied(self.config).get(name, name)}, sites.head)
        return shell.get_submodule(sites.head)

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch = IN_MEMORY) -> States:
        """The hidden states that enter the first layer, one [B, S, D] a batch."""
        module, states = self.embedding(), States(scratch, self.device)
        with torch.inference_mode():
            for batch in batches:
                states.append(module(batch.input_ids_BS.to(self.device)))
        return states

    def _shell(self, index: int) -> nn.Module:
        """The whole model with one layer and no weights: parameters on the meta device, buffers real."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM

        one = self.family.student_config(self.config, self.dims.replace(layers=1), [index])
        model_type = one.pop("model_type")
        with init_empty_weights(include_buffers=False):
            shell = AutoModelForCausalLM.from_config(
                AutoConfig.for_model(model_type, **one), dtype=self.dtype, attn_implementation="sdpa"
            )
        return shell.eval().requires_grad_(False)

    def _fill(self, shell: nn.Module, names: dict[str, str], part: str) -> None:
        """Read tensors (parameter name → name on disk) into `shell`; all of `part` must have its weights then."""
        state = {ours: self._source(disk).to(self.device, self.dtype) for ours, disk in names.items()}
        shell.load_state_dict(state, strict=False, assign=True)
        empty = [name for name, value in shell.get_submodule(part).named_parameters() if value.is_meta]
        assert not empty, f"the family names no tensor for {part}: {', '.join(empty)}"
