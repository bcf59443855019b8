"""A model run layer by layer, so that no more than one layer (or the embedding) is in memory at a time.

The layers themselves are transformers' own modules: a model of one layer is built on the meta device from the family's
config for just that layer, and given that layer's tensors. Masks, rotary positions and everything else a family does
are therefore the family's, and what is measured here is what the whole model would compute.

B batch · S sequence · D hidden · V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdscale.errors import DataError
from kdscale.families import Family, TensorSpec
from kdscale.models.head import OutputHead, head_of, logit_scale
from kdscale.models.hidden_states import IN_MEMORY, HiddenStates, Scratch
from kdscale.models.parameter_map import assemble


class TokenBatch(Protocol):
    """What a pass needs of a batch; data.loader's batches are such. Positions restart at 0 with every document."""

    @property
    def input_ids_BS(self) -> Tensor: ...  # noqa: N802

    @property
    def position_ids_BS(self) -> Tensor: ...  # noqa: N802


TensorSource = Callable[[str], Tensor]


class DecoderLayer:
    """One decoder layer with its weights, inside the shell of a whole model that has no other weights."""

    def __init__(self, shell: nn.Module, family: Family, index: int):
        self.index = index
        self._base: Any = shell.get_submodule(shell.base_model_prefix)  # type: ignore[arg-type]
        self.module: nn.Module = shell.get_submodule(f"{family.sites.layers}.0")

    def site(self, path: str) -> nn.Module:
        """A module inside the layer by the family's path, e.g. `mlp.down_proj`."""
        assert path, "this family has no such site"  # an empty path would be the layer itself
        return self.module.get_submodule(path)

    def release(self) -> None:
        """Free the weights now: modules and their hooks are in reference cycles, and wait for the collector."""
        for parameter in self.module.parameters():
            parameter.data = parameter.data.new_empty(0)

    def __call__(self, hidden_BSD: Tensor, position_ids_BS: Tensor) -> Tensor:
        handle = self.module.register_forward_pre_hook(enter_with(hidden_BSD), prepend=True, with_kwargs=True)
        try:
            return self._base(
                inputs_embeds=hidden_BSD, position_ids=position_ids_BS, attention_mask=None, use_cache=False
            ).last_hidden_state
        finally:
            handle.remove()


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

    @property
    def depth(self) -> int:
        """How many layers the model has."""
        return self.dims.layers

    def embedding(self) -> Callable[[Tensor, Tensor], Tensor]:
        """(token ids, position ids) → what enters the first layer: the model itself, without layers and final norm."""
        shell, sites = self._shell(0), self.family.sites
        self._fill(shell, self._outer("embed", "position_embed", "embed_norm", "embed_norm_bias"), sites.embed)
        for path in filter(None, (sites.embed, sites.rotary)):
            shell.get_submodule(path).to(self.device)
        replace_module(shell, sites.layers, nn.ModuleList())
        replace_module(shell, sites.final_norm, nn.Identity())
        base: Any = shell.get_submodule(shell.base_model_prefix)  # type: ignore[arg-type]

        def enter(input_ids_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
            found: Tensor = base(
                input_ids=input_ids_BS, position_ids=position_ids_BS, attention_mask=None, use_cache=False
            ).last_hidden_state
            return found

        return enter

    def layer(self, index: int) -> DecoderLayer:
        """Layer `index` with its tensors just read. `release` it before asking for the next one."""
        shell = self._shell(index)
        sites = self.family.sites
        ours, theirs = self.family.layer_prefix(0), self.family.layer_prefix(index)
        specs = {
            name: replace(spec, parameter=ours + spec.parameter.removeprefix(theirs))
            for name, spec in self.family.layer_tensors(self.config, index).items()
        }
        self._fill(shell, specs, f"{sites.layers}.0")
        for spec in self._outer("position_embed").values():
            replace_module(shell, spec.parameter.removesuffix(".weight"), NoPositions())
        replace_module(shell, sites.final_norm, nn.Identity())  # the hidden state leaves the layer as it is
        if sites.rotary:
            shell.get_submodule(sites.rotary).to(self.device)
        return DecoderLayer(shell, self.family, index)

    def layers(self) -> Iterator[DecoderLayer]:
        """All layers in order; each is released when the next one is asked for."""
        for index in range(self.dims.layers):
            layer = self.layer(index)
            yield layer
            layer.release()

    def final_norm(self) -> nn.Module:
        shell = self._shell(0)
        self._fill(shell, self._outer("final_norm", "final_norm_bias"), self.family.sites.final_norm)
        return shell.get_submodule(self.family.sites.final_norm)

    def output_head(self) -> tuple[OutputHead, float]:
        """The head, and what its input is multiplied by before it (heads.py)."""
        shell, path = self._shell(0), self.family.sites.head
        specs = self._outer("head", "head_bias")
        for tensor, other in self.family.tied(self.config).items():
            specs[other] = replace(self._outer("embed")[other], parameter=self.family.parameter(tensor))
        self._fill(shell, specs, path)
        return head_of(shell), logit_scale(shell)

    def head(self) -> Callable[[Tensor], Tensor]:
        """Final hidden states → fp32 logits, with all that the model does to them."""
        head, scale = self.output_head()
        return lambda hidden: head.logits(hidden * scale)

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch = IN_MEMORY) -> HiddenStates:
        """The hidden states that enter the first layer, one [B, S, D] per batch; raises as `embedded` does."""
        states = HiddenStates(scratch, self.device)
        for state_BSD in self.embedded(batches):
            states.append(state_BSD)
        return states

    def embedded(self, batches: Sequence[TokenBatch]) -> Iterator[Tensor]:
        """The same batch after batch, for a caller that keeps them in another way.

        Raises DataError for a sequence with more positions than the model has learned.
        """
        for name, spec in self._outer("position_embed").items():
            check_positions(name, spec, [batch.position_ids_BS for batch in batches])
        enter = self.embedding()
        for batch in batches:
            with torch.inference_mode():
                state_BSD = enter(batch.input_ids_BS.to(self.device), batch.position_ids_BS.to(self.device))
            yield state_BSD

    def _outer(self, *roles: str) -> dict[str, TensorSpec]:
        outer = self.family.outer_tensors(self.config)
        return {name: spec for name, spec in outer.items() if spec.role in roles}

    def _shell(self, index: int) -> nn.Module:
        """The whole model with one layer and no weights: parameters on the meta device, buffers real."""
        from accelerate import init_empty_weights
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.initialization import no_init_weights

        one = self.family.student_config(self.config, self.dims.replace(layers=1), [index])
        model_type = one.pop("model_type")
        with init_empty_weights(include_buffers=False), no_init_weights():
            shell = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **one), dtype=self.dtype)
        return shell.eval().requires_grad_(False)

    def _fill(self, shell: nn.Module, specs: Mapping[str, TensorSpec], part: str) -> None:
        """Read tensors (by name on disk) into `shell`; all of `part` must have its weights then."""
        state = assemble(specs, lambda name: self._source(name).to(self.device, self.dtype))
        shell.load_state_dict(state, strict=False, assign=True)
        empty = [name for name, value in shell.get_submodule(part).named_parameters() if value.is_meta]
        assert not empty, f"the family names no tensor for {part}: {', '.join(empty)}"


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def enter_with(hidden_BSD: Tensor) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """A pre-hook of the first layer that hands it this hidden state, whatever the model made of its embeddings.

    Multipliers and learned positions belong before the first layer only, and a shell runs any layer as its first.
    """

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (hidden_BSD, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": hidden_BSD}

    return hook


class NoPositions(nn.Module):
    """In place of a table of learned positions, where the hidden state has them already."""

    def forward(self, position_ids_BS: Tensor) -> Tensor:
        return torch.zeros(1, device=position_ids_BS.device)


def check_positions(table: str, spec: TensorSpec, position_ids: Sequence[Tensor]) -> None:
    """Raises DataError for a position beyond the learned ones: the look-up would end in an index error."""
    longest = max((int(ids_BS.max()) for ids_BS in position_ids), default=0)
    if longest >= spec.shape[0]:
        raise DataError(
            f"a sequence is longer than the {spec.shape[0]} positions of {table}",
            expected=f"at most {spec.shape[0]} tokens",
            got=f"{longest + 1} tokens",
            hint="lower importance.seq_len",
        )
