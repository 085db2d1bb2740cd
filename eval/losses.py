"""The loss of every token of texts of any length, read by a recurrent model in parts, and its mean by position.

Symbols: M tokens of all sequences laid end to end, N sequences.
"""

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from modeling_rwkv.chunks import chunks

CHUNK = 2048  # tokens that are read together, and whose logits are in memory at a time


@torch.inference_mode()
def token_losses(model: PreTrainedModel, ids: Tensor, cu_seqlens: Tensor, chunk: int = CHUNK) -> Tensor:
    """-log p of each token given those before it in its sequence, in nats; 0 for the first of each sequence.

    However long a sequence is, its state is carried from chunk to chunk: memory is that of one.

    Args:
        ids: (M,) int64; cu_seqlens: (N + 1,) int64 on the CPU, where sequences begin, and M.
        chunk: tokens in one forward pass; changes nothing but memory and time.

    Returns:
        (M,) float32, on the device of the model.
    """
    ids, head = ids.to(model.device), model.get_output_embeddings()
    following, losses, cache = F.pad(ids[1:], (0, 1)), [], None
    for begin, end, inside, continues in chunks(cu_seqlens, chunk):
        output = model.base_model(
            input_ids=ids[None, begin:end],
            cu_seq_lens_q=inside,
            past_key_values=cache if continues else None,
            use_cache=True,
        )
        cache = output.past_key_values
        logits = head(output.last_hidden_state[0]).float()
        losses.append(F.cross_entropy(logits, following[begin:end], reduction="none"))
    of_next = torch.cat(losses)
    return F.pad(of_next[:-1], (1, 0)).index_fill(0, cu_seqlens[:-1].to(ids.device), 0)


class PositionLosses:
    """Sums of losses over positions 1, 2 to 3, 4 to 7, ...: as many as there are before the next power of two."""

    def __init__(self) -> None:
        self._nats, self._counts = torch.zeros(2, 64, dtype=torch.float64)
        self._last = 0

    def add(self, positions: Tensor, nats: Tensor) -> None:
        """Losses (n,) of tokens at `positions` (n,) int64 from 1 on, counted in their texts."""
        if len(positions):
            bins = torch.frexp(positions.double()).exponent.long() - 1
            self._nats.index_add_(0, bins, nats.double().to("cpu"))
            self._counts.index_add_(0, bins, torch.ones_like(bins, dtype=torch.float64))
            self._last = max(self._last, int(positions.max()))

    @property
    def nats(self) -> float:
        return float(self._nats.sum())

    @property
    def tokens(self) -> int:
        return int(self._counts.sum())

    @property
    def mean(self) -> float:
        return float(self._nats.sum() / self._counts.sum())

    def means(self) -> dict[int, float]:
        """From the last position of each bin to the mean loss there."""
        ends = [min(end - 1, self._last) for _, end in pairwise(2**i for i in range(len(self._counts) + 1))]
        sums = zip(ends, self._nats.tolist(), self._counts.tolist(), strict=True)
        return {end: nats / count for end, nats, count in sums if count}
