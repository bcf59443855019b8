"""Decoding by a CUDA graph: the kernels of a step are recorded once and started all together.

Started one by one, the kernels of a small model take less time than starting them does, and a model with fewer layers
looks faster than a narrow one by more than it is in a serving engine.

B sequences · S tokens of a prompt
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_WARM_UP_STEPS = 3  # libraries choose kernels and allocate at first calls, which no graph may hold


class GraphRefusedError(Exception):
    """Why a model's decoding cannot be recorded; never shown without being caught."""


class GraphDecoder:
    """Greedy decoding of `sequences` sequences of at most `length` tokens, over a cache that never moves.

    Source: PyTorch's notes on CUDA semantics, "CUDA Graphs"; transformers' StaticCache keeps how far it is filled on
    the device, so that a step holds no number of the host. Raises GraphRefusedError for a model with sliding windows,
    whose cache counts on the host.
    """

    def __init__(self, model: PreTrainedModel, sequences: int, length: int):
        from transformers import StaticCache

        self._model: Any = model
        self._cache: Any = StaticCache(config=model.config, max_cache_len=length + _WARM_UP_STEPS + 1)
        if any(getattr(layer, "is_sliding", False) for layer in self._cache.layers):
            raise GraphRefusedError("the cache of its sliding windows counts on the host")
        self._ids_B1 = torch.zeros((sequences, 1), dtype=torch.long, device=model.device)
        self._graph: Any = None

    @torch.inference_mode()
    def record(self, prompt_BS: Tensor) -> None:
        """Warm up after the prompts and record one step. Raises GraphRefusedError where a step waits for the host."""
        self.first(prompt_BS)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP_STEPS):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self.step()
        except RuntimeError as error:
            from kdscale.runtime.device import is_lack_of_memory

            if is_lack_of_memory(error):
                raise
            text = " ".join(str(error).split())[:200]
            raise GraphRefusedError(f"a decoding step of it cannot be recorded: {text}") from error
        self._graph = graph

    @torch.inference_mode()
    def first(self, prompt_BS: Tensor) -> list[int]:
        """Run the prompts into the emptied cache; returns the token after each."""
        self._cache.reset()
        self._advance(prompt_BS)
        return self._on_host()

    @torch.inference_mode()
    def following(self) -> list[int]:
        """The next token of each sequence, by the graph where one was recorded."""
        if self._graph is None:
            self.step()
        else:
            self._graph.replay()
        return self._on_host()

    def step(self) -> None:
        """One token of each sequence, without the host waiting for anything."""
        self._advance(self._ids_B1)

    def _advance(self, ids_BS: Tensor) -> None:
        output = self._model(input_ids=ids_BS, past_key_values=self._cache, use_cache=True, logits_to_keep=1)
        self._ids_B1.copy_(output.logits[:, -1].argmax(-1, keepdim=True))

    def _on_host(self) -> list[int]:
        return [int(token) for token in self._ids_B1.flatten().tolist()]
