"""A model run layer by layer, so that no more than one layer (or the embedding) is in memory at a time.

The layers are transformers' own modules: a model of one layer is built on the meta device from the family's config for
just that layer, and given that layer's tensors. Masks, rotary positions and everything else a family does are therefore
transformers', and what is measured here is what the whole model would compute.

Layers of some models read more than the stream: an input of their own, or the keys and values of an earlier layer. A
state holds that too then, behind the stream (`BesideStream`); `LayerStream.stream` takes the stream out of it.

B batch · S sequence · D hidden · E a state · N chosen tokens · V vocabulary
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kdscale.errors import DataError
from kdscale.families import Family, Sites, TensorSpec
from kdscale.families.cuttable import may_end, sources_lacking
from kdscale.models.attention import attend_within_documents, to_attention
from kdscale.models.experts import weigh_inputs
from kdscale.models.head import OutputHead, encoder_parts, head_of, logit_scale, without_cache, without_head
from kdscale.models.hidden_states import IN_MEMORY, BesideStream, HiddenStates, Keys, Scratch
from kdscale.models.loading import auto_class, built_config, explain_library_errors
from kdscale.models.parameter_map import assemble
from kdscale.models.skeleton import move_buffers


class TokenBatch(Protocol):
    """What a pass needs of a batch, as data.batches makes them. Positions restart at 0 with every document."""

    @property
    def input_ids_BS(self) -> Tensor: ...  # noqa: N802

    @property
    def position_ids_BS(self) -> Tensor: ...  # noqa: N802


_IN_FP32 = ("router_correction",)  # roles of small numbers that transformers keeps in fp32 whatever the dtype
_AS_STORED = ("layer_embed",)  # a table of all layers: what is looked up is in the dtype of the rest
_EMBEDDING_ROLES = (
    "embed", "position_embed", "type_embed", "embed_norm", "embed_norm_bias", "layer_embed", "layer_inputs",
    "layer_inputs_norm",
)  # fmt: skip
_TRANSFORM_ROLES = ("transform", "transform_bias", "transform_norm", "transform_norm_bias")
_LOGITS_AT_ONCE = 1 << 25  # values of one chunk of rows

TensorSource = Callable[[str], Tensor]  # a tensor by its name on disk


class EnoughSeenError(Exception):
    """Raised by a hook: ends a layer's forward pass behind which nothing is wanted."""


class DecoderLayer:
    """Layer `index` of a model with its weights; `model` is a model of that one layer without other weights."""

    def __init__(self, model: nn.Module, family: Family, config: Mapping[str, Any], index: int, beside: BesideStream):
        self._beside = beside
        self.index, self.sites = index, family.layer_sites(config, index)
        # of the router's tensors, the dimension that counts experts
        self.router_axes = {
            spec.parameter.removeprefix(f"{family.layer_prefix(index)}{self.sites.router}."): spec.axes.index("experts")
            for spec in family.layer_tensors(config, index).values()
            if spec.role.startswith("router")
        }
        self._base: Any = without_head(model)
        self._encoder = encoder_parts(model)
        if family.data.layer_inputs is not None:  # each layer is given its own: the model is to make none
            setattr(self._base, str(family.data.sizes[family.data.layer_inputs].field), 0)
        self.module: nn.Module = model.get_submodule(f"{family.sites.layers}.0")

    def site(self, path: str) -> nn.Module:
        """The module of the layer at one of the family's paths, e.g. `mlp.down_proj`."""
        assert path, "this family has no such site"  # an empty path would be the layer itself
        return self.module.get_submodule(path)

    def release(self) -> None:
        """Free the weights now: modules and their hooks are in reference cycles, which only the collector would end."""
        for parameter in self.module.parameters():
            parameter.data = parameter.data.new_empty(0)

    def __call__(self, state_BSE: Tensor, position_ids_BS: Tensor) -> Tensor:
        """What leaves the layer. Positions on the host spare a wait for the device to learn where documents begin."""
        beside, device = self._beside, state_BSE.device
        hidden_BSD, own = beside.stream(state_BSE), beside.input_of(state_BSE, self.index)
        handle = self.module.register_forward_pre_hook(enter_with(hidden_BSD, own), prepend=True, with_kwargs=True)
        keys = _shared_keys(beside.shared(state_BSE)) if beside.keys else {}
        try:
            after_BSD: Tensor = self._base(
                inputs_embeds=hidden_BSD, position_ids=position_ids_BS.to(device), attention_mask=None,
                **without_cache(self._encoder), **to_attention(self._base, position_ids_BS, None, device),
                **({"shared_kv_states": keys} if beside.keys else {}),
            ).last_hidden_state  # fmt: skip
        finally:
            handle.remove()
        return beside.leaving(state_BSE, after_BSD, keys) if beside.reads_more else after_BSD

    def look(self, state_BSE: Tensor, position_ids_BS: Tensor) -> None:
        """Run the layer for the sake of its hooks, until one of them raises EnoughSeenError."""
        with suppress(EnoughSeenError):
            self(state_BSE, position_ids_BS)


class LayerStream:
    """One model as a LayerSource, with its embedding, final norm and head.

    `config` is the model's config.json; `source` gives its tensors (`Checkpoint.tensor`, or slices of it). Weights and
    hidden states are in `dtype` on `device`.
    """

    def __init__(
        self, config: dict[str, Any], family: Family, source: TensorSource, *, dtype: torch.dtype, device: torch.device
    ):
        self.config, self.family, self._source = config, family, source
        self.dtype, self.device = dtype, device
        self.dims, self.beside = family.dims(config), BesideStream.of(family, config)

    def stream(self, state: Tensor) -> Tensor:
        """[..., D] of [..., E]: what norms and the head read of a state."""
        return self.beside.stream(state)

    @property
    def depth(self) -> int:
        """How many layers the model has."""
        return self.dims.layers

    def embedding(self, change: Callable[[nn.Module], None] = lambda _: None) -> Callable[[Tensor, Tensor], Tensor]:
        """(token ids, position ids) → what enters the first layer: the model itself, without layers and final norm.

        `change` is shown the model before it runs.
        """
        sites, inputs = self.family.sites, list[Tensor]()  # those that layers have of their own
        deep = bool(self.beside.width)
        model = self._model_of(range(self.depth)) if deep else self._one_layer_model(0)
        self._fill(model, self._outer(*_EMBEDDING_ROLES), sites.embed)
        model.get_submodule(sites.embed).to(self.device)
        _move_rotary(model, sites, self.device)
        replace_module(model, sites.layers, nn.ModuleList(_SeesInput(inputs) for _ in range(self.depth if deep else 0)))
        self._leave_out(model, sites.final_norm, sites.pooler)
        change(model)
        base, encoder = without_head(model), encoder_parts(model)
        if encoder is not None:
            move_buffers(model, self.device)
        first = encoder.first_position if encoder is not None else 0

        def enter(input_ids_BS: Tensor, position_ids_BS: Tensor) -> Tensor:
            inputs.clear()
            hidden_BSD: Tensor = base(
                input_ids=input_ids_BS, position_ids=position_ids_BS + first, attention_mask=None,
                **without_cache(encoder),
            ).last_hidden_state  # fmt: skip
            return self.beside.entering(hidden_BSD, inputs) if self.beside.reads_more else hidden_BSD

        return enter

    def layer(self, index: int) -> DecoderLayer:
        """Layer `index` with its tensors just read. `release` it before asking for the next one."""
        model, sites = self._one_layer_model(index), self.family.sites
        prefix, only_prefix = self.family.layer_prefix(index), self.family.layer_prefix(0)
        specs = {
            name: replace(spec, parameter=only_prefix + spec.parameter.removeprefix(prefix))
            for name, spec in self.family.layer_tensors(self.config, index).items()
        }
        self._fill(model, specs, f"{sites.layers}.0")
        model.get_submodule(f"{sites.layers}.0").to(self.device)  # what a mixer keeps beside its weights
        for spec in self._outer("position_embed", "type_embed").values():
            replace_module(model, spec.parameter.removesuffix(".weight"), NoPositions())
        norms = [spec.parameter.removesuffix(".weight") for spec in self._outer("embed_norm").values()]
        self._leave_out(model, sites.final_norm, sites.pooler, *norms)  # the hidden state leaves the layer as it is
        _move_rotary(model, sites, self.device)
        return DecoderLayer(model, self.family, self.config, index, self.beside)

    def layers(self) -> Iterator[DecoderLayer]:
        """All layers in order; each is released when the next one is asked for."""
        for index in range(self.dims.layers):
            layer = self.layer(index)
            yield layer
            layer.release()

    def final_norm(self) -> nn.Module:
        """The norm between the last layer and the head; it changes nothing where the last layer ends with a norm."""
        if not self.family.sites.final_norm:
            return nn.Identity()
        model = self._one_layer_model(0)
        self._fill(model, self._outer("final_norm", "final_norm_bias"), self.family.sites.final_norm)
        return model.get_submodule(self.family.sites.final_norm)

    def output_head(self) -> tuple[OutputHead, float]:
        """The head, and what its input is multiplied by before it (head.py)."""
        model = self._model_with_head()
        return head_of(model), logit_scale(model)

    def _model_with_head(self) -> nn.Module:
        """The model with the weights of its head alone, and of what stands before it."""
        model, path = self._one_layer_model(0), self.family.sites.head
        specs = self._outer("head", "head_bias", *_TRANSFORM_ROLES)
        for tensor, other in self.family.tied(self.config).items():
            specs[other] = replace(self._outer("embed")[other], parameter=self.family.parameter(tensor))
        for name, spec in specs.items():  # BERT's is tied to a parameter beside it
            if spec.role == "head_bias":
                specs[name] = replace(spec, parameter=f"{path}.bias")
        self._fill(model, specs, path)
        return model

    def head(self, change: Callable[[nn.Module], None] = lambda _: None) -> Callable[[Tensor], Tensor]:
        """Final hidden states → fp32 logits, with all that the model does to them; of an encoder without a head the
        states as they are, and of classes the logits of each row, which is one document. `change` is shown the model
        that has the head.
        """
        if not self.family.sites.head:
            return lambda hidden: hidden.float()
        model = self._model_with_head()
        change(model)
        head, scale, encoder = head_of(model), logit_scale(model), encoder_parts(model)
        if encoder is not None:
            return lambda hidden: head.logits(encoder.before_head(encoder.of_rows(hidden)))
        return lambda hidden: head.logits(hidden * scale)

    def embed(self, batches: Sequence[TokenBatch], scratch: Scratch = IN_MEMORY) -> HiddenStates:
        """The states that enter the first layer, one [B, S, E] per batch; raises as `embedded` does."""
        states = HiddenStates(scratch, self.device)
        for state_BSD in self.embedded(batches):
            states.append(state_BSD)
        return states

    def embedded(self, batches: Sequence[TokenBatch]) -> Iterator[Tensor]:
        """What enters the first layer, batch after batch, for a caller that keeps it in its own way.

        Raises DataError for a sequence with more positions than the model has learned.
        """
        self.check_positions([batch.position_ids_BS for batch in batches])
        enter = self.embedding()
        for batch in batches:
            with torch.inference_mode():
                state_BSD = enter(batch.input_ids_BS.to(self.device), batch.position_ids_BS.to(self.device))
            yield state_BSD

    def check_positions(self, position_ids: Sequence[Tensor]) -> None:
        """Raises DataError for a position beyond those that the model has learned."""
        first = self.family.first_position(self.config)
        for name, spec in self._outer("position_embed").items():
            check_positions(name, spec.shape[0] - first, position_ids)

    def _outer(self, *roles: str) -> dict[str, TensorSpec]:
        outer = self.family.outer_tensors(self.config)
        return {name: spec for name, spec in outer.items() if spec.role in roles}

    def _leave_out(self, model: nn.Module, *paths: str) -> None:
        """Let the modules at these paths, where there are some, pass on what they are given."""
        for path in filter(None, paths):
            replace_module(model, path, nn.Identity())

    def _one_layer_model(self, index: int) -> nn.Module:
        """The model with layer `index` alone and no weights: parameters on the meta device, buffers real."""
        # transformers would make another layer of one that comes first, or last: it is built between those that do
        first = [0] if self.family.data.first_layer_differs else []
        built, lacks = sorted({*first, index, self._last_with(index)}), sources_lacking(self.family, self.config)
        while missing := lacks(built):  # nor can it be built without one whose keys and values it reads
            built = sorted({*built, missing[0][0]})
        model = self._model_of(built)
        if len(built) > 1:
            place, layers = built.index(index), list(model.get_submodule(self.family.sites.layers).children())
            replace_module(model, self.family.sites.layers, nn.ModuleList([layers[place]]))
            if self.family.data.shared_keys_in is not None:  # it is the first now, also to the model's own config
                for entry in self.family.data.layer_lists:
                    values: Any = getattr(model.config, entry.field)
                    values[0] = values[place]
        encoder_parts(model)  # found once, while nothing is left out
        if self.family.data.experts_weigh == "input" and (sites := self.family.layer_sites(self.config, index)).experts:
            weigh_inputs(model.get_submodule(f"{sites.layers}.0"), sites)
        attend_within_documents(model)
        return model.eval().requires_grad_(False)

    def _last_with(self, index: int) -> int:
        """The layer to build last beside layer `index`: itself where a model may end with it, but for models in which
        the last layers read keys and values, since no layer gives out any without such."""
        return index if may_end(self.family, self.config)[index] and not self.beside.keys else self.depth - 1

    def _model_of(self, layers: Sequence[int]) -> nn.Module:
        from accelerate import init_empty_weights
        from transformers.initialization import no_init_weights

        student = self.family.student_config(self.config, self.dims.replace(layers=len(layers)), layers)
        config = self.family.language(student)
        with explain_library_errors(self.family.where), init_empty_weights(include_buffers=False), no_init_weights():
            model: nn.Module = auto_class(config).from_config(built_config(config), dtype=self.dtype)
        return model.eval().requires_grad_(False)

    def _fill(self, model: nn.Module, specs: Mapping[str, TensorSpec], path: str) -> None:
        """Read tensors (by name on disk) into `model`; the module at `path` must have all its weights then."""

        def read(name: str) -> Tensor:
            role, tensor = specs[name].role, self._source(name)
            dtype = torch.float32 if role in _IN_FP32 else tensor.dtype if role in _AS_STORED else self.dtype
            return tensor.to(self.device, dtype)

        state = assemble(specs, read)
        model.load_state_dict(state, strict=False, assign=True)
        empty = [name for name, value in model.get_submodule(path).named_parameters() if value.is_meta]
        assert not empty, f"the family names no tensor for {path}: {', '.join(empty)}"


class NextToken:
    """Final norm and head of one model: hidden states → log-probabilities in fp32."""

    def __init__(self, stream: LayerStream):
        self._head, self._norm, self._stream = stream.head(), stream.final_norm(), stream.stream
        self.rows_at_once = max(1, _LOGITS_AT_ONCE // stream.dims.vocab)

    def log_probabilities(self, state_BSD: Tensor, rows_N: Tensor) -> Tensor:
        """[N, V] for the tokens `rows_N` of a batch; `state_BSD` is what leaves the last layer."""
        return self.of_rows(state_BSD.flatten(0, -2)[rows_N])

    def of_rows(self, state_ND: Tensor) -> Tensor:
        """[N, V] for what leaves the last layer at N tokens."""
        return torch.log_softmax(self._head(self._norm(self._stream(state_ND))), dim=-1)


def _move_rotary(model: nn.Module, sites: Sites, device: torch.device) -> None:
    """Move the rotary frequencies, if the model has any: some families leave them to the config."""
    rotary = dict(model.named_modules()).get(sites.rotary) if sites.rotary else None
    if rotary is not None:
        rotary.to(device)


def replace_module(root: nn.Module, path: str, module: nn.Module) -> None:
    """Put `module` in the place of the module at `path` inside `root`."""
    parent, _, leaf = path.rpartition(".")
    setattr(root.get_submodule(parent), leaf, module)


def _shared_keys(keys: Keys) -> Any:
    """As transformers' models take them, and fill in those of the layers that run."""
    from transformers.cache_utils import KVSharingDict

    return KVSharingDict(keys)


class _SeesInput(nn.Module):
    """Stands for a layer: passes the stream on, and keeps what this layer would be given of its own."""

    def __init__(self, seen: list[Tensor]):
        super().__init__()
        self._seen = seen

    def forward(self, hidden_BSD: Tensor, own: Tensor, **_: Any) -> Tensor:
        self._seen.append(own)
        return hidden_BSD


def enter_with(hidden_BSD: Tensor, own: Tensor | None = None) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]:
    """A pre-hook of the first layer that hands it this hidden state, whatever the model made of its embeddings.

    Multipliers and learned positions belong before the first layer only, and here any layer is run as the first. `own`
    stands for what the layer is given behind the stream, if that is something.
    """

    def hook(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if args:
            return (hidden_BSD, *(args[1:] if own is None else (own, *args[2:]))), kwargs
        return args, {**kwargs, "hidden_states": hidden_BSD}

    return hook


class NoPositions(nn.Module):
    """Stands for a table of learned positions where the hidden state has them already: adds zero."""

    def forward(self, position_ids_BS: Tensor) -> Tensor:
        return torch.zeros(1, device=position_ids_BS.device)


def check_positions(table: str, positions: int, position_ids: Sequence[Tensor]) -> None:
    """Raise DataError for a position beyond the learned ones, where the look-up would end in an index error."""
    longest = max((int(ids_BS.max()) for ids_BS in position_ids), default=0)
    if longest >= positions:
        raise DataError(
            f"a sequence is longer than the {positions} positions of {table}",
            expected=f"at most {positions} tokens",
            got=f"{longest + 1} tokens",
            hint="lower importance.seq_len",
        )
