"""Training on sequences of any length in the memory of a part: they are read a chunk at a time, there and back.

What an RNN hands from one chunk to the next is its state. Only those are kept; the rest is computed again when the
gradient comes to it. Cutting the gradient between chunks is truncated backpropagation through time (Williams and Peng
1990), and then not even states are kept; letting it through gives the gradients of the whole, at any length.

Symbols: M tokens of all sequences laid end to end, N sequences, L blocks, C channels.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint, get_device_states, set_device_states

from modeling_rwkv.cache import LayerState, RwkvCache
from modeling_rwkv.loss import autocast_alone

# The loss of some tokens and the cache after them, from themselves, their labels, where sequences begin among them,
# and the cache that the first of these continues.
ReadChunk = Callable[[Tensor, Tensor, Tensor, RwkvCache], tuple[Tensor, RwkvCache]]


class Chunk(NamedTuple):
    """Some tokens: where they begin and end among all, and (k + 1,) where sequences do, from 0 on, among them."""

    begin: int
    end: int
    bounds: Tensor
    continues: bool  # whether its first sequence is that of the token before it


def loss_by_chunks(
    model: nn.Module,
    read: ReadChunk,
    x: Tensor,
    labels: Tensor,
    cu_seqlens: Tensor,
    chunk_length: int,
    carry_gradients: bool,
) -> Tensor:
    """The sum of what ``read`` gives for the tokens of each chunk.

    Args:
        model: the module whose parameters ``read`` uses: these and ``x`` get gradients, and they have no second ones.
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

    def part(x: Tensor, chunk: Chunk, *state: Tensor) -> tuple[Tensor, ...]:
        cache = RwkvCache()
        cache.layers = [LayerState(*state[i : i + 3]) for i in range(0, len(state), 3)]
        loss, cache = read(x, labels[chunk.begin : chunk.end], chunk.bounds, cache)
        return loss, *(tensor for layer in cache.layers for tensor in layer)

    plan = list(chunks(cu_seqlens, chunk_length))
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not any(hasattr(p, "device_mesh") or hasattr(p, "ds_id") for p in parameters):
        return _ReadTwice.apply(model, part, plan, carry_gradients, x, *parameters)
    # Where FSDP2 or ZeRO-3 keeps parameters in parts, they are whole, and their gradients find their way, only between
    # hooks of modules in one graph. It takes about 0.1 MiB a block and chunk.
    losses: list[Tensor] = []
    state: list[Tensor] = []
    for chunk in plan:
        state = [tensor if carry_gradients else tensor.detach() for tensor in state if chunk.continues]
        loss, *state = checkpoint(part, x[chunk.begin : chunk.end], chunk, *state, use_reentrant=False)
        losses.append(loss)
    return torch.stack(losses).sum()


class _ReadTwice(torch.autograd.Function):
    """The sum of losses; the backward pass reads each chunk again, with gradients, from the state that was kept.

    With the gradients of states the last chunk comes first. Without, the first does, and the others' states and random
    numbers follow from it, as they did in the forward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        model: nn.Module,
        part: Callable[..., tuple[Tensor, ...]],
        plan: list[Chunk],
        carry: bool,
        x: Tensor,
        *parameters: nn.Parameter,
    ) -> Tensor:
        ctx.model, ctx.part, ctx.plan, ctx.carry, ctx.parameters = model, part, plan, carry, parameters
        ctx.autocast = autocast_alone(x.device.type)
        ctx.devices = list({y.device: y for y in (x, *parameters)}.values())  # a tensor on each
        ctx.kept = []
        ctx.save_for_backward(x)
        losses: list[Tensor] = []
        state: list[Tensor] = []
        for chunk in plan:
            state = state if chunk.continues else []
            if carry or not losses:
                ctx.kept.append((state, torch.get_rng_state(), get_device_states(*ctx.devices)))
            with ctx.autocast:
                loss, *state = part(x[chunk.begin : chunk.end], chunk, *state)
            losses.append(loss)
        return torch.stack(losses).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,) = ctx.saved_tensors
        grad_x = torch.zeros_like(x) if x.requires_grad else None
        kept = list(ctx.kept)
        devices, _ = kept[0][2]
        state: Sequence[Tensor] = ()
        grads: list[Tensor | None] = []  # of the state after a chunk
        with _stand_ins(ctx.model, ctx.parameters) as stand_ins, torch.random.fork_rng(devices):
            for chunk in reversed(ctx.plan) if ctx.carry else ctx.plan:
                if kept:
                    state, on_cpu, on_devices = kept.pop()
                    torch.set_rng_state(on_cpu)
                    set_device_states(*on_devices)
                inputs = x[chunk.begin : chunk.end].detach().requires_grad_(x.requires_grad)
                state = [tensor.detach().requires_grad_(ctx.carry) for tensor in state if chunk.continues]
                with torch.enable_grad(), ctx.autocast:
                    loss, *after = ctx.part(inputs, chunk, *state)
                pairs = zip((loss, *after), (grad, *grads), strict=False)
                ends = [(y, slope) for y, slope in pairs if y.requires_grad and slope is not None]
                torch.autograd.backward([y for y, _ in ends], [slope for _, slope in ends])
                grads = [tensor.grad for tensor in state]
                state = after
                if grad_x is not None:
                    grad_x[chunk.begin : chunk.end] = inputs.grad
        return None, None, None, None, grad_x, *(stand_in.grad for stand_in in stand_ins)


@contextmanager
def _stand_ins(model: nn.Module, parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Others with the same values in the place of ``parameters``, to sum up gradients without setting off hooks."""
    stand_ins = {parameter: nn.Parameter(parameter.detach()) for parameter in parameters}
    places = [
        (module, name, parameter)
        for module in model.modules()
        for name, parameter in module.named_parameters(recurse=False)
        if parameter in stand_ins
    ]
    try:
        for module, name, parameter in places:
            setattr(module, name, stand_ins[parameter])
        yield list(stand_ins.values())
    finally:
        for module, name, parameter in places:
            setattr(module, name, parameter)


def chunks(cu_seqlens: Tensor, length: int) -> Iterator[Chunk]:
    """The chunks of ``length`` tokens, or fewer at the end, in sequences that begin at ``cu_seqlens`` (N + 1,)."""
    tokens = int(cu_seqlens[-1])
    for begin in range(0, tokens, length):
        end = min(begin + length, tokens)
        inside = cu_seqlens[(cu_seqlens > begin) & (cu_seqlens < end)].tolist()
        bounds = torch.tensor(sorted({begin, *inside, end})) - begin
        yield Chunk(begin, end, bounds, not bool((cu_seqlens == begin).any()))
