"""Reads a prefix tree with an RWKV: many runs in one forward pass, depth first, in bounded memory for states.

Symbols: B rows, one run each, T tokens of the longest, C channels, V vocabulary, Q questions, P positions asked about.
"""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from accelerate.utils.memory import clear_device_cache, should_reduce_batch_size
from numpy.typing import NDArray
from torch import Tensor, nn

from modeling_rwkv import RwkvCache, RwkvForCausalLM
from modeling_rwkv.cache import LayerState
from rwkv_eval.prefix_tree import Run, runs_below

logger = logging.getLogger(__name__)

MOST_POSITIONS = 4  # of the padded batch for each token in it: padding is not computed, but takes memory
HEAD_ROWS = 1024  # positions whose logits are in memory at a time


class States:
    """States of runs, each in a slot; slot 0 holds what every sequence begins with, and is never free."""

    def __init__(self, model: RwkvForCausalLM, budget: int, branches: int) -> None:
        """A third of ``budget`` bytes each is for slots, no more than ``branches``, and for the rows of a batch before
        and after it."""
        with torch.no_grad():  # one token, for shapes, dtypes and devices of all layers
            token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
            layers = model.base_model(token, use_cache=True).past_key_values.layers
        fit = budget // 3 // sum(part.nbytes for layer in layers for part in layer)
        self.most_rows = max(1, fit)
        self.slots = min(fit, branches)
        self.free = list(range(self.slots, 0, -1))
        rows = 1 + self.slots
        self.layers = [LayerState(*(part.new_zeros(rows, *part.shape[1:]) for part in layer)) for layer in layers]
        initial = model.base_model.initial_state
        if initial is not None:
            self._write(initial.cache(), [0], [0])

    def take(self, slots: Sequence[int]) -> RwkvCache | None:
        """Copies of these states as a cache of as many rows; None if all are what every sequence begins with."""
        if not any(slots):
            return None
        cache, index = RwkvCache(), torch.tensor(slots)
        cache.layers = [LayerState(*(part[index.to(part.device)] for part in layer)) for layer in self.layers]
        return cache

    def keep(self, cache: RwkvCache, rows: Sequence[int]) -> list[int]:
        """Copies of ``rows`` of ``cache`` go into free slots, which are returned."""
        slots = [self.free.pop() for _ in rows]
        self._write(cache, rows, slots)
        return slots

    def _write(self, cache: RwkvCache, rows: Sequence[int], slots: Sequence[int]) -> None:
        for to, layer in zip(self.layers, cache.layers, strict=True):
            for kept, part in zip(to, layer, strict=True):
                index = torch.tensor([rows, slots], device=kept.device)
                kept[index[1]] = part.to(kept)[index[0]]


class TreeReader:
    """Iterates over batches of the runs below ``root`` and their hidden states (B, T, C), zero at right padding.

    Runs that branch come first, the deepest before others, for as long as there are slots for their states and too few
    runs that end, whose states nobody needs, to fill a batch; these are read together, the longest first. A run that
    branches and finds no slot dissolves: its branches read its tokens again.

    Args:
        model: called without gradients, as it is; under whatever autocast is active.
        capacity: tokens of a batch.
        budget: bytes for states.
        shrinks: try again with half the tokens when out of memory.
    """

    def __init__(self, model: RwkvForCausalLM, root: Run, capacity: int, budget: int, shrinks: bool = False) -> None:
        runs = list(runs_below(root))
        self.model, self.capacity, self.shrinks = model, capacity, shrinks
        self.left = sum(map(len, runs))  # tokens
        self.states = States(model, budget, sum(1 for run in runs if run.children))
        self.branching: list[Run] = []
        self.ending: list[Run] = []
        self.pending = 0  # tokens of runs that end
        self._add(root.children)

    def __iter__(self) -> Iterator[tuple[list[Run], Tensor]]:
        while runs := self._next():
            try:
                hidden, cache = self._read(runs)
            except RuntimeError as error:
                if not (self.shrinks and len(runs) > 1 and should_reduce_batch_size(error)):
                    raise
                hidden = None
            if hidden is None:  # and the error, which holds on to what was allocated, is gone
                clear_device_cache(garbage_collection=True)
                self.capacity = sum(map(len, runs)) // 2
                logger.warning("Out of memory: going on with %d tokens at a time.", self.capacity)
                self._add(runs)
                continue
            self._settle(runs, cache)
            yield runs, hidden

    def _add(self, runs: Sequence[Run]) -> None:
        self.branching += [run for run in runs if run.children]
        ending = [run for run in runs if not run.children]
        self.ending += ending
        self.pending += sum(map(len, ending))

    def _next(self) -> list[Run]:
        """The runs of the next batch; none at the end."""
        while self.branching and self.pending < self.capacity:
            if self.states.free:
                return self._fill(self.branching, len(self.states.free))
            if self.ending and self.states.slots:
                break  # this will free some
            run = self.branching.pop()
            self.left += len(run) * (len(run.children) - 1)
            self._add(run.dissolve())
        self.ending.sort(key=len)
        runs = self._fill(self.ending, len(self.ending)) if self.ending else []
        self.pending -= sum(map(len, runs))
        return runs

    def _fill(self, stack: list[Run], most: int) -> list[Run]:
        runs = [stack.pop()]
        tokens = longest = len(runs[0])
        while stack and len(runs) < min(most, self.states.most_rows):
            tokens, longest = tokens + len(stack[-1]), max(longest, len(stack[-1]))
            if tokens > self.capacity or (len(runs) + 1) * longest > MOST_POSITIONS * self.capacity:
                break
            runs.append(stack.pop())
        return runs

    @torch.no_grad()
    def _read(self, runs: list[Run]) -> tuple[Tensor, RwkvCache | None]:
        """Hidden states (B, T, C), and the states after the runs if one of them branches."""
        lengths = np.array([len(run) for run in runs])
        valid = np.arange(lengths.max()) < lengths[:, None]
        ids = np.zeros(valid.shape, np.int64)
        ids[valid] = np.concatenate([run.tokens for run in runs])
        outputs = self.model.base_model(
            torch.from_numpy(ids).to(self.model.device),
            attention_mask=torch.from_numpy(valid).to(self.model.device),
            past_key_values=self.states.take([run.parent.slot for run in runs if run.parent is not None]),
            use_cache=any(run.children for run in runs),
            return_dict=True,
        )
        return outputs.last_hidden_state, outputs.past_key_values

    def _settle(self, runs: list[Run], cache: RwkvCache | None) -> None:
        """Keep the states that runs go on from, and free those that none does any more."""
        self.left -= sum(map(len, runs))
        for run in runs:
            if run.parent is not None:
                run.parent.waiting -= 1
                if run.parent.waiting == 0 and run.parent.slot:
                    self.states.free.append(run.parent.slot)
        rows = [row for row, run in enumerate(runs) if run.children]
        if cache is not None:
            for row, slot in zip(rows, self.states.keep(cache, rows), strict=True):
                runs[row].slot = slot
                self._add(runs[row].children)


class Answers(NamedTuple):
    """who: (Q,) number of the asker; logprob: (Q,) float64, nats; greedy: (Q,) bool, no other token is likelier."""

    who: NDArray[np.int64]
    logprob: NDArray[np.float64]
    greedy: NDArray[np.bool_]


@torch.no_grad()
def answer(runs: list[Run], hidden: Tensor, head: nn.Module, dtype: torch.dtype) -> Answers:
    """Answers to what the ``runs`` are asked, one for each target token, from ``hidden`` (B, T, C).

    The head runs where something is asked, once however many ask, ``HEAD_ROWS`` positions at a time; log-softmax in
    ``dtype``.
    """
    asked = [(row, question) for row, run in enumerate(runs) for question in run.questions]
    if not asked:
        return Answers(np.empty(0, np.int64), np.empty(0), np.empty(0, np.bool_))
    lengths = [len(question.targets) for _, question in asked]
    who = np.repeat([question.who for _, question in asked], lengths)
    targets = torch.from_numpy(np.concatenate([question.targets for _, question in asked])).to(hidden.device)
    firsts = [row * hidden.shape[1] + question.first for row, question in asked]
    where = np.concatenate([first + np.arange(n) for first, n in zip(firsts, lengths, strict=True)])
    positions, index = np.unique(where, return_inverse=True)
    x = hidden.flatten(0, 1)[torch.from_numpy(positions).to(hidden.device)]
    logprob, greedy = np.empty(len(who)), np.empty(len(who), np.bool_)
    for begin in range(0, len(x), HEAD_ROWS):
        here = np.flatnonzero((index >= begin) & (index < begin + HEAD_ROWS))
        logits = head(x[begin : begin + HEAD_ROWS])
        rows, wanted = torch.from_numpy(index[here] - begin).to(logits.device), targets[torch.from_numpy(here)]
        greedy[here] = _is_likeliest(logits, rows, wanted).cpu().numpy()
        logprob[here] = logits.log_softmax(-1, dtype=dtype)[rows, wanted].double().cpu().numpy()
    return Answers(who, logprob, greedy)


def _is_likeliest(logits: Tensor, rows: Tensor, wanted: Tensor) -> Tensor:
    """Whether ``wanted`` (q,) are what ``argmax`` takes of ``rows`` (q,) of logits (P, V)."""
    likeliest = logits[rows, wanted] == logits.amax(-1)[rows]
    ties = likeliest.nonzero()[:, 0]  # argmax takes the first; on a CPU it is 15 times as slow as amax
    likeliest[ties] = logits[rows[ties]].argmax(-1) == wanted[ties]
    return likeliest
