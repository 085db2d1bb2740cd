"""Token sequences as a tree, in which what several of them begin with is there once.

A recurrent state stands for everything before it, whatever its length: so each run of the tree need be read only once,
and where it branches every branch goes on from a copy of one state.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

Tokens = NDArray[np.int64]


@dataclass(eq=False, slots=True)
class Question:
    """How likely are ``targets`` (n,) after the tokens of a run from its ``first`` on? ``who`` asks: a number."""

    who: int
    first: int
    targets: Tokens


@dataclass(eq=False, slots=True)
class Run:
    """Tokens (n,) that follow the first ``start`` tokens of some sequences; the root has none.

    slot: where its state is kept; waiting: how many of its children have not been read.
    """

    tokens: Tokens
    start: int
    parent: "Run | None" = field(default=None, repr=False)
    children: list["Run"] = field(default_factory=list, repr=False)
    questions: list[Question] = field(default_factory=list)
    slot: int = 0
    waiting: int = 0

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def end(self) -> int:
        return self.start + len(self.tokens)

    def ask(self, who: int, targets: Tokens) -> None:
        """How likely are ``targets`` after the last tokens of a sequence that ends with this run?"""
        run, end = self, self.end
        while len(targets):
            if run.parent is None:
                raise ValueError(f"{len(targets)} tokens are to be predicted before there is one to predict them from")
            before = max(0, run.start - (end - len(targets)))
            run.questions.append(Question(who, end - len(targets) + before - run.start, targets[before:]))
            run, end, targets = run.parent, run.start, targets[:before]

    def dissolve(self) -> list["Run"]:
        """The children instead of this run, each beginning with a copy of its tokens: no state need be kept."""
        assert self.parent is not None
        for child in self.children:
            child.tokens = np.concatenate([self.tokens, child.tokens])
            child.start, child.parent = self.start, self.parent
            for question in child.questions:
                question.first += len(self)
        self.children[0].questions += self.questions
        self.parent.waiting += len(self.children) - 1
        return self.children


def build(sequences: Sequence[Tokens], longest: int) -> tuple[Run, list[Run]]:
    """The tree of ``sequences``, whatever their order, in runs of at most ``longest`` tokens.

    Args:
        sequences: of at least one token each, no two the same.

    Returns:
        the root, and for each sequence the run that it ends with.
    """
    root = Run(np.empty(0, np.int64), 0)
    ends = [root] * len(sequences)
    path, last = [root], root.tokens
    for i in sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">i8").tobytes()):
        tokens = sequences[i]
        shared = _shared(last, tokens)
        while path[-1].start >= shared and len(path) > 1:
            path.pop()
        if path[-1].end > shared:
            path[-1] = _cut(path[-1], shared)
        for start in range(shared, len(tokens), longest):
            run = Run(tokens[start : start + longest], start, path[-1])
            path[-1].children.append(run)
            path.append(run)
        ends[i], last = path[-1], tokens
    for run in [root, *runs_below(root)]:
        run.waiting = len(run.children)
    return root, ends


def runs_below(root: Run) -> Iterator[Run]:
    """All runs of a tree but its root."""
    stack = list(root.children)
    while stack:
        run = stack.pop()
        yield run
        stack += run.children


def _shared(a: Tokens, b: Tokens) -> int:
    """How many tokens both begin with."""
    n = min(len(a), len(b))
    differs = a[:n] != b[:n]
    return int(differs.argmax()) if differs.any() else n


def _cut(run: Run, at: int) -> Run:
    """Cut the last child of its parent in two: a new run up to ``at``, which is returned, and ``run`` after it."""
    assert run.parent is not None
    head = Run(run.tokens[: at - run.start], run.start, run.parent, [run])
    run.parent.children[-1] = head
    run.tokens, run.start, run.parent = run.tokens[at - run.start :], at, head
    return head
