"""An n-gram language model: interpolated modified Kneser-Ney, in numpy, exact.

    model = NGram.train(documents, order=5, vocab_size=4096, start=0)
    probabilities = model.score(document)  # one per symbol

A baseline that a neural model has to beat. Symbols are integers below `vocab_size`: tokens, or
bytes. A k-gram is one int64, its symbols as digits in base `vocab_size`, so nothing is hashed
and nothing collides. (Chen & Goodman 1999, "An empirical study of smoothing techniques for
language modeling", section 3; the lowest order is interpolated with the uniform distribution.)

D documents, N symbols, K different k-grams, H different contexts, V vocabulary size.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Level:
    """The k-grams of one length, and their contexts (the k-gram without its last symbol).

    keys: (K,) int64 sorted; discounted: (K,) counts less their discount; contexts: (H,) int64
    sorted; totals: (H,) sum of counts; backoff: (H,) mass left for the next shorter context.
    """

    keys: np.ndarray
    discounted: np.ndarray
    contexts: np.ndarray
    totals: np.ndarray
    backoff: np.ndarray

    @classmethod
    def from_counts(cls, keys: np.ndarray, counts: np.ndarray, vocab_size: int) -> "Level":
        discounts = modified_discounts(counts)[np.minimum(counts, 3)]
        contexts, first = np.unique(keys // vocab_size, return_index=True)
        totals = np.add.reduceat(counts, first)
        return cls(keys, counts - discounts, contexts, totals, np.add.reduceat(discounts, first) / totals)


@dataclass(frozen=True)
class NGram:
    """`levels[k - 1]` holds the k-grams."""

    levels: tuple[Level, ...]
    vocab_size: int
    start: int

    @classmethod
    def train(cls, documents: Iterable[Sequence[int]], order: int, vocab_size: int, start: int) -> "NGram":
        """Count n-grams of `documents`, each of which ends with whatever symbol ends it.

        Args:
            start: the symbol that stands `order - 1` times before every document, and is given,
                never predicted, there. No n-gram reaches into the document before.

        Raises:
            ValueError: n-grams of this order do not fit in 63 bits, or there is no symbol.
        """
        if order < 1 or vocab_size**order >= 2**63:
            raise ValueError(f"order {order} does not fit a vocabulary of {vocab_size}; lower it")
        grams = [_grams(document, order, vocab_size, start) for document in documents]
        keys, counts = np.unique(np.concatenate([*grams, _EMPTY]), return_counts=True)
        if not len(keys):
            raise ValueError("there is nothing to count: the training documents are empty")
        levels = [Level.from_counts(keys, counts, vocab_size)]
        for length in range(order - 1, 0, -1):
            # Shorter k-grams count in how many different contexts they were seen.
            keys, counts = np.unique(levels[0].keys % vocab_size**length, return_counts=True)
            levels.insert(0, Level.from_counts(keys, counts, vocab_size))
        return cls(tuple(levels), vocab_size, start)

    def score(self, document: Sequence[int]) -> np.ndarray:
        """Probability of each symbol given those before it in `document`: (N,) float64."""
        keys = _grams(document, len(self.levels), self.vocab_size, self.start)
        probability = np.full(len(keys), 1 / self.vocab_size)
        for length, level in enumerate(self.levels, start=1):
            key = keys % self.vocab_size**length
            at, known = _find(level.contexts, key // self.vocab_size)
            here, seen = _find(level.keys, key)
            direct = np.where(seen, level.discounted[here], 0) / level.totals[at]
            probability = np.where(known, direct + level.backoff[at] * probability, probability)
        return probability


_EMPTY = np.empty(0, dtype=np.int64)


def _grams(document: Sequence[int], order: int, vocab_size: int, start: int) -> np.ndarray:
    """The n-gram that ends at each symbol: (N,) int64, its latest symbol the lowest digit."""
    symbols = np.concatenate([np.full(order - 1, start), np.asarray(document)]).astype(np.int64)
    keys = np.zeros(len(document), dtype=np.int64)
    for offset in range(order):
        keys = keys * vocab_size + symbols[offset : offset + len(document)]
    return keys


def _find(sorted_keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions of `wanted` in `sorted_keys` (any where absent), and whether it is there."""
    at = np.minimum(np.searchsorted(sorted_keys, wanted), len(sorted_keys) - 1)
    return at, sorted_keys[at] == wanted


def modified_discounts(counts: np.ndarray) -> np.ndarray:
    """What counts 0, 1, 2 and 3 or more are lowered by: (4,) float64.

    Text with too few different counts to estimate them from gets half a count off everything.
    """
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in (1, 2, 3, 4))
    if not (n1 and n2 and n3 and n4):
        return np.array([0.0, 0.5, 0.5, 0.5])
    y = n1 / (n1 + 2 * n2)
    estimates = [1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3]
    return np.array([0.0, *np.clip(estimates, 0.01, [1.0, 2.0, 3.0])])
