"""WKV-4 in plain PyTorch, parallel over time: one scan, run backwards for the gradients.

Symbols: M tokens of all sequences laid end to end, N sequences, C channels, S steps of a group,
G groups.

A run of steps is a linear map of the state, and such maps join associatively. So sequences are cut
into groups of at most ``SPAN`` steps; every group's sum is taken from an empty start, all groups at
once; a scan over the sums (the same function again) gives each group its true start; then ``SPAN``
vectorised steps give the state before every token. That is ``SPAN * log_SPAN(T)`` Python steps,
fewer than the ``2 sqrt(T)`` of a two-level scheme.

Groups begin where their sequence begins, and all sums are written out as operations on single
numbers, so a sequence gives the same bits alone, in a batch and packed.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

EMPTY_EXPONENT = -1e38
SPAN = 32
TILE = 0  # nothing is kept for the gradients


@dataclass
class Elements:
    """Terms of a scan, or the states that they add up to: ``pair * e^exponent``.

    pair: (2, ..., C), numerator and denominator; exponent: (..., C).
    """

    pair: Tensor
    exponent: Tensor

    @classmethod
    def from_state(cls, state: Tensor) -> "Elements":
        """From (N, 3, C); where the denominator is 0 there is no history, whatever p says."""
        a, b, p = state.unbind(1)
        return cls(torch.stack([a, b]), torch.where(b == 0, EMPTY_EXPONENT, p))

    def state(self) -> Tensor:
        """As (N, 3, C)."""
        return torch.stack([*self.pair, self.exponent], dim=1)

    def flip(self) -> "Elements":
        """Last token, or last sequence, first."""
        return Elements(self.pair.flip(1), self.exponent.flip(0))


class Groups:
    """How sequences of ``lengths`` > 0 tokens, laid end to end, are cut into groups of a SPAN.

    ``Groups.of`` remembers: all layers of a model ask for the same.
    """

    def __init__(self, lengths: Tensor, device: torch.device) -> None:
        self.steps = min(SPAN, int(lengths.max()))
        self.counts = (lengths + self.steps - 1) // self.steps
        self.size = int(self.counts.sum())
        self.regular = bool((lengths % self.steps == 0).all())
        first = self.counts.cumsum(0) - self.counts
        self.last = (first + self.counts - 1).to(device)
        self.steps_of_last = (lengths - (self.counts - 1) * self.steps).to(device)
        if not self.regular:
            ends = lengths.cumsum(0).repeat_interleave(self.counts)
            rank = torch.arange(self.size) - first.repeat_interleave(self.counts)
            begins = (lengths.cumsum(0) - lengths).repeat_interleave(self.counts) + rank * self.steps
            token = begins + torch.arange(self.steps)[:, None]
            used = (token < ends).flatten().nonzero()[:, 0]
            slot = torch.empty_like(used)
            slot[token.flatten()[used]] = used
            self.token, self.slot = token.minimum(ends - 1).to(device), slot.to(device)

    @classmethod
    def of(cls, lengths: Tensor, device: torch.device) -> "Groups":
        return _groups(tuple(lengths.tolist()), SPAN, device)

    def fold(self, x: Tensor) -> Tensor:
        """(..., M, C) as (..., S, G, C): one slice is one step of all groups.

        Slots behind the end of a sequence repeat its last token; nobody reads what comes of them.
        """
        if self.regular:
            return x.unflatten(-2, (self.size, self.steps)).transpose(-3, -2)
        return x[..., self.token, :]

    def unfold(self, x: Tensor) -> Tensor:
        """(..., S, G, C) as (..., M, C)."""
        if self.regular:
            return x.transpose(-3, -2).flatten(-3, -2)
        return x.flatten(-3, -2)[..., self.slot, :]


@lru_cache(maxsize=32)
def _groups(lengths: tuple[int, ...], span: int, device: torch.device) -> Groups:
    return Groups(torch.tensor(lengths), device)


def scan(terms: Elements, decay: Tensor, lengths: Tensor, initial: Elements) -> tuple[Elements, Elements]:
    """The state before every term and after each sequence: ``state = e^decay state + term``.

    Args:
        terms: pair (2, M, C), exponent (M, C).
        decay: (C,), at most 0.
        lengths: (N,) int64 on the CPU, each > 0, adding up to M.
        initial: pair (2, N, C), exponent (N, C): the states before the first terms.

    Returns:
        states in the shapes of ``terms`` and of ``initial``.
    """
    groups = Groups.of(lengths, terms.exponent.device)
    terms = Elements(groups.fold(terms.pair), groups.fold(terms.exponent))
    start = initial
    if groups.size > len(lengths):
        start, _ = scan(_sums(terms, decay), decay * groups.steps, groups.counts, initial)
    pair = terms.pair.new_empty(2, groups.steps + 1, *start.exponent.shape)
    exponent = terms.exponent.new_empty(pair.shape[1:])
    pair[:, 0], exponent[0] = start.pair, start.exponent
    for t in range(groups.steps):
        old, term, new = exponent[t] + decay, terms.exponent[t], exponent[t + 1]
        torch.maximum(old, term, out=new)
        torch.mul(pair[:, t], _exp_(old.sub_(new)), out=pair[:, t + 1])
        pair[:, t + 1].addcmul_(terms.pair[:, t], _exp_(term - new))
    final = Elements(pair[:, groups.steps_of_last, groups.last], exponent[groups.steps_of_last, groups.last])
    return Elements(groups.unfold(pair[:, :-1]), groups.unfold(exponent[:-1])), final


def _exp_(x: Tensor) -> Tensor:
    """``e^x`` in place, 0 where it underflows.

    There ``torch.exp`` is up to 100 times slower on a CPU, and so is all that multiplies the subnormal numbers that it
    gives.
    """
    smallest = math.log(torch.finfo(x.dtype).tiny)
    return torch.threshold_(x, smallest, -math.inf).exp_()


def _sums(terms: Elements, decay: Tensor) -> Elements:
    """What each group of terms, (2, S, G, C), adds up to from an empty start, (2, G, C)."""
    steps = len(terms.exponent)
    to_end = torch.arange(steps - 1, -1, -1, dtype=decay.dtype, device=decay.device)
    weight = terms.exponent + (to_end[:, None] * decay)[:, None]
    exponent = weight.amax(0)
    weight = _exp_(weight.sub_(exponent))
    return Elements(_add_up(terms.pair * weight), exponent)


def _add_up(x: Tensor) -> Tensor:
    """The sum over dimension 1, by halves, in place.

    Not ``Tensor.sum``, whose order of additions depends on where in memory a channel lies.
    """
    while (steps := x.shape[1]) > 1:
        half = steps // 2
        x[:, :half] += x[:, steps - half :]
        x = x[:, : steps - half]
    return x[:, 0]


@dataclass
class Problem:
    """The operator's arguments as a scan over tokens laid end to end; empty sequences left out."""

    w: Tensor
    u: Tensor
    k: Tensor
    v: Tensor
    initial: Elements
    lengths: Tensor
    live: Tensor | None

    @classmethod
    def of(
        cls,
        time_decay: Tensor,
        time_first: Tensor,
        key: Tensor,
        value: Tensor,
        state: Tensor,
        cu_seqlens: Tensor | None,
    ) -> "Problem":
        batch, time, channels = key.shape
        lengths = torch.full((batch,), time) if cu_seqlens is None else cu_seqlens.cpu().long().diff()
        live = None
        if not lengths.all():
            live = lengths.nonzero()[:, 0]
            lengths, state = lengths[live], state[live.to(state.device)]
        return cls(
            w=-torch.exp(time_decay.to(state.dtype)),
            u=time_first.to(state.dtype),
            k=key.to(state.dtype).reshape(-1, channels).contiguous(),
            v=value.to(state.dtype).reshape(-1, channels).contiguous(),
            initial=Elements.from_state(state),
            lengths=lengths,
            live=live,
        )

    def states(self) -> tuple[Elements, Elements]:
        """The state before every token, and after every sequence."""
        terms = Elements(torch.stack([self.v, torch.ones_like(self.v)]), self.k)
        return scan(terms, self.w, self.lengths, self.initial)

    def spread(self, live_states: Tensor, all_states: Tensor) -> Tensor:
        """``all_states`` with the sequences that have tokens replaced by ``live_states``."""
        if self.live is None:
            return live_states
        return all_states.index_copy(0, self.live.to(all_states.device), live_states)


def _weights(before: Elements, bonus_key: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The common scale of an output's terms; the weights of the past and of this token at it."""
    scale = torch.maximum(before.exponent, bonus_key)
    return scale, _exp_(before.exponent - scale), _exp_(bonus_key - scale)


def forward(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    tiles: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output (B, T, C) and final state (N, 3, C), from the checked arguments of ``wkv4``; key is not empty."""
    problem = Problem.of(time_decay, time_first, key, value, state, cu_seqlens)
    before, final = problem.states()
    _, past, now = _weights(before, problem.u + problem.k)
    (numerator, denominator), v = before.pair, problem.v
    numerator = numerator.mul_(past).addcmul_(now, v)
    denominator = denominator.mul_(past).add_(now)
    output = numerator.div_(denominator).to(key.dtype).view(key.shape)
    return output, problem.spread(final.state(), state)


def backward(
    grad_output: Tensor,
    grad_state: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    tiles: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first five arguments of ``wkv4``; key is not empty.

    The adjoints of A and B obey ``alpha_{t-1} = e^w alpha_t + gy_t / D_t`` (``beta`` with
    ``-gy_t y_t / D_t``), D_t being the denominator of y_t: the forward scan once more, over the
    tokens from last to first.
    """
    grad_state = torch.cat([grad_state[:, :2], torch.zeros_like(grad_state[:, 2:])], dim=1)
    problem = Problem.of(time_decay, time_first, key, value, state, cu_seqlens)
    before, final = problem.states()
    w, k, v = problem.w, problem.k, problem.v
    scale, past, now = _weights(before, problem.u + k)
    numerator, denominator = before.pair * past + now * torch.stack([v, torch.ones_like(v)])
    grad_numerator = grad_output.reshape(k.shape) / denominator
    grad_denominator = grad_numerator * (numerator / denominator).neg_()

    live_grad = grad_state if problem.live is None else grad_state[problem.live.to(grad_state.device)]
    at_end = Elements(live_grad[:, :2].transpose(0, 1), -final.exponent)
    terms = Elements(torch.stack([grad_numerator, grad_denominator]), scale.neg_())
    adjoint, at_start = scan(terms.flip(), w, problem.lengths.flip(0), at_end.flip())
    adjoint, at_start = adjoint.flip(), at_start.flip()

    alpha, beta = adjoint.pair
    (a, b), surprise = before.pair, now * past / denominator
    bonus = surprise * (b * v - a) * grad_numerator  # v - y without the cancellation, times the rest
    weight = _exp_(k + adjoint.exponent)
    grad_value = now * grad_numerator + weight * alpha
    grad_key = bonus + weight * (v * alpha + beta)
    decayed = _exp_(before.exponent + adjoint.exponent + w)
    grad_decay = (decayed * (before.pair * adjoint.pair).sum(0)).sum(0) * w
    at_start.pair *= _exp_(problem.initial.exponent + at_start.exponent)
    at_start.exponent.zero_()
    return (
        grad_decay.to(time_decay.dtype),
        bonus.sum(0).to(time_first.dtype),
        grad_key.to(key.dtype).view(key.shape),
        grad_value.to(value.dtype).view(value.shape),
        problem.spread(at_start.state(), grad_state),
    )
