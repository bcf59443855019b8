"""What a model that is streamed layer by layer says of the next token, a chunk of tokens at a time.

B batch · S sequence · D hidden · N chosen tokens · V vocabulary
"""

from __future__ import annotations

import torch
from torch import Tensor

from kdscale.models.layer_stream import LayerStream

_LOGITS_AT_ONCE = 1 << 25  # values of one chunk of rows


class NextToken:
    """Final norm and head of one model: hidden states → log-probabilities in fp32."""

    def __init__(self, stream: LayerStream):
        self._head, self._norm = stream.head(), stream.final_norm()
        self.rows_at_once = max(1, _LOGITS_AT_ONCE // stream.dims.vocab)

    def log_probabilities(self, state_BSD: Tensor, rows_N: Tensor) -> Tensor:
        """[N, V] for the tokens `rows_N` of a batch; `state_BSD` is what leaves the last layer."""
        return self.of_rows(state_BSD.flatten(0, -2)[rows_N])

    def of_rows(self, state_ND: Tensor) -> Tensor:
        """[N, V] for what leaves the last layer at N tokens."""
        return torch.log_softmax(self._head(self._norm(state_ND)), dim=-1)
