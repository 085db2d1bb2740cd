"""Training on sequences of any length in the memory of a part: they are read a chunk at a time, there and back.

What an RNN hands from one chunk to the next is its state. Only those are kept, and what autograd needs to find its way
(of each chunk about 0.1 MiB a block, whatever its length); the rest is computed again when the gradient comes to it.
Cutting the gradient between chunks is truncated backpropagation through time (Williams and Peng 1990); letting it
through gives the gradients of the whole, at any length.

Symbols: M tokens of all sequences laid end to end, N sequences, L blocks, C channels.
"""

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from modeling_rwkv.cache import LayerState, RwkvCache

# The loss of some tokens and the cache after them, from themselves, their labels, where sequences begin among them,
# and the cache that the first of these continues.
ReadChunk = Callable[[Tensor, Tensor, Tensor, RwkvCache], tuple[Tensor, RwkvCache]]


def loss_by_chunks(
    read: ReadChunk, x: Tensor, labels: Tensor, cu_seqlens: Tensor, chunk_length: int, carry_gradients: bool
) -> Tensor:
    """The sum of what ``read`` gives for the tokens of each chunk.

    Args:
        read: called with n tokens of ``x`` and their labels, (k + 1,) cumulative lengths of the sequences that they
            belong to, and a cache of one row or an empty one. Called once more in the backward pass.
        x: (M, 1) or (M, C), tokens or their embeddings; labels: (M, 1) int64.
        cu_seqlens: (N + 1,) int64 on the CPU, where sequences begin.
        chunk_length: tokens read at a time, of one sequence or several.
        carry_gradients: whether what a chunk reads can be learned from in later ones.

    Raises:
        ValueError: ``chunk_length`` is no positive whole number.
    """
    if type(chunk_length) is not int or chunk_length < 1:
        raise ValueError(f"chunk_length is {chunk_length!r}: expected a positive whole number")

    def part(x: Tensor, labels: Tensor, bounds: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        cache = RwkvCache()
        cache.layers = [LayerState(*state[i : i + 3]) for i in range(0, len(state), 3)]
        loss, cache = read(x, labels, bounds, cache)
        return loss, *(tensor for layer in cache.layers for tensor in layer)

    losses: list[Tensor] = []
    state: list[Tensor] = []
    for begin, end, bounds, continues in chunks(cu_seqlens, chunk_length):
        if not continues:
            state = []
        elif not carry_gradients:
            state = [tensor.detach() for tensor in state]
        loss, *state = checkpoint(part, x[begin:end], labels[begin:end], bounds, *state, use_reentrant=False)
        losses.append(loss)
    return torch.stack(losses).sum()


def chunks(cu_seqlens: Tensor, length: int) -> Iterator[tuple[int, int, Tensor, bool]]:
    """The chunks of tokens in sequences that begin at ``cu_seqlens`` (N + 1,).

    For each its begin and end among all tokens, the bounds of sequences within it from 0 on, and whether its first
    sequence is that of the token before it.
    """
    tokens = int(cu_seqlens[-1])
    for begin in range(0, tokens, length):
        end = min(begin + length, tokens)
        inside = cu_seqlens[(cu_seqlens > begin) & (cu_seqlens < end)].tolist()
        bounds = torch.tensor(sorted({begin, *inside, end})) - begin
        yield begin, end, bounds, not bool((cu_seqlens == begin).any())
