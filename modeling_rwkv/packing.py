"""Padding, packing and continuing from a cache are one thing: sequences of valid tokens laid end to end.

Symbols: B rows of T positions, M valid tokens, N sequences, C channels.

A row may hold padding anywhere and several sequences one after the other. The first sequence of a row continues the
row's cache, the others start anew, and the row's cache continues its last sequence. Blocks compute on a layout:
`Rows` where every position is valid and every row is one sequence, `Packed` for everything else.
"""

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor
from torch.nn import functional as F

IGNORED = -100  # the label of a position that does not count, as in all of transformers


class Rows:
    """Every row is one whole sequence: tensors are (B, T, C) and states (B, ...), nothing is moved."""

    cu_seqlens = None

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Rows":
        return self

    def pack(self, x: Tensor) -> Tensor:
        return x

    def unpack(self, x: Tensor) -> Tensor:
        return x

    def begin(self, row_state: Tensor, fresh: Tensor | float = 0) -> Tensor:
        return row_state

    def end(self, state: Tensor) -> Tensor:
        return state

    def shift(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """The token shift: (B, T, C) with every token replaced by the one before it, the first by ``previous``."""
        if previous is None:
            return F.pad(x, (0, 0, 1, -1))
        return torch.cat([previous.to(x.dtype)[:, None], x[:, :-1]], dim=1)

    def last(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """The last token of every sequence, (B, C); a copy, so that keeping it does not keep all of ``x``."""
        return x[:, -1].clone()

    def next_labels(self, labels: Tensor) -> Tensor:
        """For every position the label that follows it in its sequence, (B, T); IGNORED where there is none."""
        return F.pad(labels[:, 1:], (0, 1), value=IGNORED)


@dataclass(frozen=True)
class Packed:
    """Tensors are (1, M, C): the valid tokens of all rows end to end; states are (N, ...).

    token: (M,) where in the flattened (B * T) positions each token is; shape: (B, T).
    cu_seqlens: (N + 1,) int64 on the CPU, where sequences begin. A row without valid tokens has one sequence of none.
    row: (N,) the row of each sequence; opens: (N,) bool, it is the first of its row; closing: (B,) the last of a row.
    filled: (F,) the sequences that have tokens; first, final: (F,) their first and last tokens.
    """

    token: Tensor
    shape: tuple[int, int]
    cu_seqlens: Tensor
    row: Tensor
    opens: Tensor
    closing: Tensor
    filled: Tensor
    first: Tensor
    final: Tensor

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Packed":
        """On another device: blocks may live on several."""
        moved = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("shape", "cu_seqlens")}
        return replace(self, **{name: x.to(device, non_blocking=non_blocking) for name, x in moved.items()})

    def pack(self, x: Tensor) -> Tensor:
        """(B, T, ...) to (1, M, ...)."""
        return x.flatten(0, 1)[self.token.to(x.device)][None]

    def unpack(self, x: Tensor) -> Tensor:
        """(1, M, C) to (B, T, C), zero at padding."""
        rows = x.new_zeros(self.shape[0] * self.shape[1], x.shape[-1])
        return rows.index_copy(0, self.token.to(x.device), x[0]).view(*self.shape, -1)

    def begin(self, row_state: Tensor, fresh: Tensor | float = 0) -> Tensor:
        """States of the rows (B, ...) to states before each sequence (N, ...), of those that do not open a row
        ``fresh`` (1, ...): all zeros is an empty state."""
        opens = self.opens.to(row_state.device).view(-1, *[1] * (row_state.ndim - 1))
        return torch.where(opens, row_state[self.row.to(row_state.device)], fresh)

    def end(self, state: Tensor) -> Tensor:
        """States after each sequence (N, ...) to states of the rows (B, ...)."""
        return state[self.closing.to(state.device)]

    def shift(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """The token shift, (1, M, C): ``previous`` (N, C), or zeros, before the first token of each sequence."""
        before = x.new_zeros(len(self.first), x.shape[-1]) if previous is None else previous[self.filled]
        before = before.to(x.dtype)
        return x.roll(1, dims=1).index_copy(1, self.first, before[None])

    def last(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """The last token of every sequence (N, C); ``previous``, or zeros, where there is none."""
        ends = x[0, self.final]
        before = x.new_zeros(len(self.row), x.shape[-1]) if previous is None else previous
        return before.to(x.dtype).index_copy(0, self.filled, ends)

    def next_labels(self, labels: Tensor) -> Tensor:
        """For every position the label that follows it in its sequence, (B, T); IGNORED where there is none."""
        token = self.token.to(labels.device)
        following = labels.flatten()[token].roll(-1).index_fill(0, self.final.to(labels.device), IGNORED)
        return torch.full_like(labels, IGNORED).flatten().index_copy(0, token, following).view(self.shape)


Layout = Rows | Packed


def arrange(
    shape: tuple[int, int],
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens: Tensor | None = None,
    seq_idx: Tensor | None = None,
) -> tuple[Layout, Tensor | None]:
    """The layout of a batch of ``shape`` (B, T), and which positions are valid: (B, T) bool, None for all.

    Args:
        attention_mask: (B, >= T), nonzero where valid; of a longer mask (past and new tokens) the end counts.
        position_ids: (B or 1, T); a sequence begins where they do not increase from one valid token to the next.
        cu_seq_lens: (n + 1,), cumulative lengths over the positions of a batch of one row.
        seq_idx: (B, T); a sequence begins where it changes.

    Raises:
        ValueError: an argument whose shape does not fit, by name.
    """
    valid = None if attention_mask is None else _valid(attention_mask, shape)
    restarts = [x for x in (position_ids, cu_seq_lens, seq_idx) if x is not None] if shape[1] > 1 else []
    if valid is not None and bool(valid.all()):
        valid = None
    if valid is None and not restarts:
        return Rows(), None
    token = torch.arange(shape[0] * shape[1], device=restarts[0].device if valid is None else valid.device)
    if valid is not None:
        token = token[valid.flatten()]
    row = token // shape[1]
    begins = row != row.roll(1)
    begins[:1] = True
    if shape[1] > 1:
        if position_ids is not None:
            position = _by_position("position_ids", position_ids, shape)[token]
            begins |= position <= position.roll(1)
        if seq_idx is not None:
            sequence = _by_position("seq_idx", seq_idx, shape)[token]
            begins |= sequence != sequence.roll(1)
        if cu_seq_lens is not None:
            sequence = _by_cumulative_length(cu_seq_lens, shape)[token]
            begins |= sequence != sequence.roll(1)
    if valid is None and int(begins.sum()) == shape[0]:
        return Rows(), None
    return _packed(shape, token, row, begins), valid


def _packed(shape: tuple[int, int], token: Tensor, row: Tensor, begins: Tensor) -> Packed:
    """The layout whose sequences begin at the tokens ``begins`` (M,) bool; rows of no tokens get an empty sequence."""
    rows = torch.arange(shape[0], device=token.device)
    first_token = torch.searchsorted(row, rows)
    without = first_token == torch.searchsorted(row, rows, right=True)
    begin = torch.cat([begins.nonzero()[:, 0], first_token[without]])
    sequence_row, order = torch.cat([row[begins], rows[without]]).sort(stable=True)
    bounds = torch.cat([begin[order], begin.new_tensor([len(token)])])
    filled = bounds.diff().nonzero()[:, 0]
    opens = torch.ones_like(sequence_row, dtype=torch.bool)
    opens[1:] = sequence_row[1:] != sequence_row[:-1]
    return Packed(
        token=token,
        shape=shape,
        cu_seqlens=bounds.cpu(),
        row=sequence_row,
        opens=opens,
        closing=torch.searchsorted(sequence_row, rows, right=True) - 1,
        filled=filled,
        first=bounds[filled],
        final=bounds[filled + 1] - 1,
    )


def _valid(attention_mask: Tensor, shape: tuple[int, int]) -> Tensor:
    rows, length = shape
    if attention_mask.ndim != 2 or attention_mask.shape[0] != rows or attention_mask.shape[1] < length:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}: expected ({rows}, {length}), "
            f"or ({rows}, past + {length}) when continuing from a cache"
        )
    return attention_mask[:, attention_mask.shape[1] - length :] != 0


def _by_position(name: str, x: Tensor, shape: tuple[int, int]) -> Tensor:
    if x.ndim != 2 or x.shape[1] != shape[1] or x.shape[0] not in (1, shape[0]):
        raise ValueError(f"{name} has shape {tuple(x.shape)}: expected {shape}")
    return x.expand(shape).flatten()


def _by_cumulative_length(cu_seq_lens: Tensor, shape: tuple[int, int]) -> Tensor:
    """The number of the sequence that each position belongs to."""
    if shape[0] != 1:
        raise ValueError(f"cu_seq_lens came with a batch of {shape[0]} rows: lay the sequences end to end in one row")
    lengths = cu_seq_lens.diff()
    if (
        cu_seq_lens.ndim != 1
        or int(lengths.sum()) != shape[1]
        or bool((lengths < 0).any())
        or int(cu_seq_lens[0]) != 0
    ):
        raise ValueError(
            f"cu_seq_lens is {cu_seq_lens.tolist()}: expected to rise from 0 to the number of tokens, {shape[1]}"
        )
    return torch.repeat_interleave(lengths)
