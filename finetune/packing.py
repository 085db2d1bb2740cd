"""Documents to rows of one length, without leaks between documents and without lost tokens.

A document longer than a row is cut into pieces; each piece starts with the last token of the one
before, so that every token after a document's first is predicted exactly once. Pieces are then
packed best-fit, longest first, and never cut again. In a row:

    input_ids      a a a a b b b - -     (T,) pieces a and b, then padding
    position_ids   0 1 2 3 0 1 2 0 1     (T,) restart = a new sequence for the model
    labels         . a a a . b b . .     (T,) "." is -100: nothing before it to predict it from

This is the convention of transformers' `DataCollatorWithFlattening`, with rows of a fixed length.
Everything is held in memory, at 4 bytes a token, 5 where some are not to be learned.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from datasets import Dataset as Table
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

IGNORED = -100
Piece = tuple[int, int]  # (start, length) in the stream of all tokens


@dataclass(frozen=True)
class TokenStream:
    """Tokenised documents laid end to end.

    tokens: (N,) int32; offsets: (D + 1,) int64, document d is tokens[offsets[d]:offsets[d + 1]].
    learned: (N,) bool, which tokens are to be predicted; None: all of them.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    learned: np.ndarray | None = None

    @classmethod
    def of(cls, table: Table) -> "TokenStream":
        """The lists of a table's column `tokens`, and `learned` if it has one, end to end."""
        columns = {name: table.with_format("arrow")[name][:].combine_chunks() for name in table.column_names}
        lengths = np.asarray(columns["tokens"].value_lengths(), dtype=np.int64)
        flat = {name: column.flatten().to_numpy(zero_copy_only=False) for name, column in columns.items()}
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        return cls(flat["tokens"].astype(np.int32, copy=False), offsets, flat.get("learned"))


def tokenize(documents: list[str], tokenizer: PreTrainedTokenizerBase, start_every: int, name: str) -> TokenStream:
    """Each document as `text <|endoftext|>`, with another `<|endoftext|>` before it sometimes.

    Args:
        start_every: 1 starts every document with `<|endoftext|>`, 2 every second one, 0 none. A
            model that has seen both reads prompts with and without it.
        name: shown by the progress bar.

    A text that spells `<|endoftext|>` gets the tokens of its letters, never the special one.
    """
    end = tokenizer.eos_token_id

    def encode(batch: dict[str, list], indices: list[int]) -> dict[str, list]:
        texts = tokenizer(
            batch["text"],
            add_special_tokens=False,
            split_special_tokens=True,
            return_attention_mask=False,
        )["input_ids"]
        starts = [start_every > 0 and i % start_every == start_every - 1 for i in indices]
        return {"tokens": [[end] * s + t + [end] for s, t in zip(starts, texts, strict=True)]}

    table = Table.from_dict({"text": documents}).map(
        encode,
        batched=True,
        with_indices=True,
        remove_columns="text",
        desc=f"Tokenizing {name}",
        keep_in_memory=True,
    )
    return TokenStream.of(table)


def cut(offsets: Sequence[int], block_size: int) -> list[Piece]:
    """Pieces of 2 to `block_size` tokens; neighbours of one document share one token."""
    pieces = []
    for begin, end in pairwise(offsets):
        for start in range(begin, end - 1, block_size - 1):
            pieces.append((int(start), int(min(block_size, end - start))))
    return pieces


def pack(pieces: Sequence[Piece], block_size: int) -> list[list[Piece]]:
    """Rows of pieces, at most `block_size` tokens each: best fit, longest piece first.

    `open_rows[f]` lists the rows with f tokens free, and bit f of `free_sizes` says that there
    are any, so the fullest row that still has room is the lowest set bit from the piece's length
    upwards: no search.
    """
    rows: list[list[Piece]] = []
    open_rows: list[list[int]] = [[] for _ in range(block_size + 1)]
    free_sizes = 0
    for piece in sorted(pieces, key=lambda piece: -piece[1]):
        fitting = free_sizes >> piece[1]
        if fitting:
            free = piece[1] + (fitting & -fitting).bit_length() - 1
            row = open_rows[free].pop()
            if not open_rows[free]:
                free_sizes &= ~(1 << free)
        else:
            free, row = block_size, len(rows)
            rows.append([])
        rows[row].append(piece)
        open_rows[free - piece[1]].append(row)
        free_sizes |= 1 << (free - piece[1])
    return rows


class PackedRows(Dataset):
    """Rows of exactly `block_size` tokens: `input_ids`, `position_ids`, `labels`, each (T,) int64.

    With `packing` false every row is one piece of 2 to `block_size` tokens: lists, for a collator that pads, without
    `position_ids`.

    Raises:
        ValueError: `block_size` is below 2, which leaves nothing to predict.
    """

    def __init__(self, stream: TokenStream, block_size: int, pad_token_id: int, packing: bool = True):
        if block_size < 2:
            raise ValueError(f"block_size is {block_size}; a row needs at least 2 tokens")
        self.stream = stream
        self.tokens = stream.tokens
        self.learned = stream.learned
        self.block_size = block_size
        self.pad_token_id = pad_token_id
        self.packing = packing
        pieces = cut(stream.offsets.tolist(), block_size)
        self.rows = pack(pieces, block_size) if packing else [[piece] for piece in pieces]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Any]:
        row = self.rows[index]
        size = self.block_size if self.packing else row[0][1]
        input_ids = np.full(size, self.pad_token_id, dtype=np.int64)
        position_ids = np.zeros(size, dtype=np.int64)
        labels = np.full(size, IGNORED, dtype=np.int64)
        used = 0
        for start, length in row:
            here, predicted = slice(used, used + length), slice(used + 1, used + length)
            input_ids[here] = self.tokens[start : start + length]
            position_ids[here] = np.arange(length)
            labels[predicted] = input_ids[predicted]
            if self.learned is not None:
                labels[predicted][~self.learned[start + 1 : start + length]] = IGNORED
            used += length
        position_ids[used:] = np.arange(size - used)
        if not self.packing:
            return {"input_ids": input_ids.tolist(), "labels": labels.tolist()}
        columns = {"input_ids": input_ids, "position_ids": position_ids, "labels": labels}
        return {name: torch.from_numpy(column) for name, column in columns.items()}

    @property
    def waste(self) -> float:
        """Share of all positions that hold padding."""
        used = sum(length for row in self.rows for _, length in row)
        return 1 - used / (len(self.rows) * self.block_size) if self.packing else 0.0
