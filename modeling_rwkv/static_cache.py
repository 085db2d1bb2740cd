"""A state that is written over, token by token, and the CUDA graph of a model that does so.

`generate(..., cache_implementation="static")` uses them.
"""

import gc
import threading
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from modeling_rwkv.cache import LayerState, RwkvCache, unstacked
from rwkv_kernels.decode_cuda import Decoder
from rwkv_kernels.decode_weights import Stack
from rwkv_kernels.wkv4_native import are_at_hand

logger = logging.get_logger(__name__)

WARM_UPS = 2  # passes before a graph is captured: libraries choose and allocate in the first
CAPTURING = threading.RLock()  # two captures at once would fail


class RwkvStaticCache(RwkvCache):
    """An :class:`RwkvCache` whose states, in ``stack``, are written over until somebody asks for ``layers`` or a copy.

    On a GPU one more token of a batch of any size then costs next to no work of the CPU. Until `generate` is given it
    again, or :meth:`reset`, weights may be edited in place but not replaced or moved, nor adapters switched. Threads
    are meant to be able to write with one model, each with a cache of its own: laws of that hold with a stand-in for
    the graph, and on GPUs it has been tried too little to be promised. The first token of each number of rows, on each
    stream, captures a graph: meanwhile PyTorch may refuse random numbers to other threads, and a thread that waits for
    the whole device may spoil the capture, so let one write first.

    plan: how its model, held weakly, computes its next token, see decoding.py; copies find their own.
    graph: where its states may be.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plan: tuple[weakref.ref[Any], Any] | None = None
        self.graph: Replay | None = None
        self._pair: tuple[Stack, Stack] | None = None

    def __getstate__(self) -> dict[str, Any]:
        self.keep()
        return self.__dict__ | {"plan": None, "graph": None}

    def keep(self) -> None:
        """Write over the states no more: from now on somebody else may have these tensors."""
        graph, self._pair = self.graph, None
        if graph is not None:
            graph.release(self)
            self.graph = None

    def _states(self) -> list[LayerState]:
        self.keep()
        return super()._states()

    def _apply(self, change: Callable[[Tensor, int], Tensor]) -> None:
        self.keep()
        super()._apply(change)

    def reset(self) -> None:
        self.keep()  # what another thread moves out of a graph meanwhile is not to come back
        super().reset()
        self.plan = None

    def lives_in(self, stack: Stack) -> bool:
        """Whether these very tensors are its states."""
        return self._stack is stack

    def turns(self, stack: Stack) -> tuple[Stack, Stack]:
        """``stack``, its states, or these outside the graph that they are in, and room for those after them."""
        if self.graph is not None:
            self.keep()
            stack = self._stack or stack
        if self._pair is None or not any(stack is one for one in self._pair):
            self._pair = stack.empty_like(), stack.empty_like()
        return stack, self._pair[stack is self._pair[0]]


class Replay:
    """One token of a model, for a batch of B rows on one stream, as a CUDA graph. One cache at a time lives in it."""

    def __init__(self, model: Any, decoder: Decoder | None, table: Tensor | None, states: Stack) -> None:
        """decoder, table: of the model, if there are; states: whose shapes and dtypes are those to come."""
        device = states.wkv.device
        self._decoder, self._table = decoder, table
        self._lock = threading.RLock()  # a signal's handler may look at a cache
        self._owner: weakref.ref[RwkvStaticCache] = weakref.ref(RwkvStaticCache())
        self._ids = torch.zeros((states.wkv.shape[1], 1), dtype=torch.int64, device=device)
        self._stack = Stack(*map(torch.clone, states))
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        self._stream = current  # where it is always replayed
        stream.wait_stream(current)
        try:
            with torch.cuda.stream(stream):
                for _ in range(WARM_UPS):
                    self._read(model)
        finally:  # what was begun writes to tensors that are let go of here
            current.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with _no_garbage(), torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._logits = self._read(model)

    @classmethod
    def of(cls, model: Any, decoder: Decoder | None, table: Tensor | None, states: Stack) -> "Replay | None":
        """None, and a warning, where something in the model cannot be captured."""
        devices = {x.device for x in model.parameters()}
        if len(devices) > 1:
            return None
        current = torch.cuda.current_stream(states.wkv.device)  # PyTorch does not return to it from a failure
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(current):
                return cls(model, decoder, table, states)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            random = torch.cuda.default_generators[current.device_index]
            random.graphsafe_set_state(random.clone_state())  # before 2.13, the old one still counts for the capture
            logger.warning(f"There is no CUDA graph of this model ({reason}): tokens are computed without one.")
            return None

    def step(self, input_ids: Tensor, cache: RwkvStaticCache) -> Tensor:
        """Logits (B, V) after one more token (B, 1) of ``cache``, whose states go on."""
        if cache.graph is not self:
            cache.keep()
        with self._lock:
            owner = self._owner()
            if owner is not cache or not cache.lives_in(self._stack):
                if owner is not None:
                    self._move_out(owner)
                _copy(self._stack, cache.stack)
                self._owner = weakref.ref(cache)
            self._ids.copy_(input_ids)
            self._graph.replay()
            cache.graph, cache.stack = self, self._stack
            return self._logits.clone()

    def release(self, cache: RwkvStaticCache) -> None:
        """Leave to ``cache``, on the current stream, what states of it are or were here, whoever writes meanwhile.

        Raises:
            RuntimeError: that stream is being captured, so cannot wait for this one.
        """
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "the states of this cache are in a CUDA graph, and now another graph is being captured: call its "
                "clone() before, and capture with that"
            )
        with self._lock:
            self._move_out(cache)
        self._hand_over(cache)

    def _hand_over(self, cache: RwkvStaticCache) -> None:
        here = torch.cuda.current_stream(self._stream.device)
        if here != self._stream:
            here.wait_stream(self._stream)
            for x in (*(cache._stack or ()), cache.fingerprint):
                if x is not None and x.is_cuda:
                    x.record_stream(here)

    def _at_home(self) -> AbstractContextManager[Any]:
        """On its stream, so before what that does next, wherever the thread is."""
        return torch.cuda.stream(self._stream)

    def _move_out(self, cache: RwkvStaticCache) -> None:
        if cache.lives_in(self._stack):
            with self._at_home(), torch.inference_mode(False), torch.no_grad():
                moved = Stack(*map(torch.clone, self._stack))
            if cache.lives_in(self._stack):  # a signal's handler may have been faster
                cache.stack = moved

    def _read(self, model: Any) -> Tensor:
        if self._decoder is not None:
            after = self._stack.empty_like() if len(self._ids) <= self._decoder.few else self._stack
            logits = self._decoder.step(*rows_of(self._table, model, self._ids), self._stack, after)
            if logits is not None:
                if after is not self._stack:
                    _copy(self._stack, after)
                return logits
        cache = RwkvCache()
        cache.layers, cache.seen_tokens = unstacked(self._stack), 1
        outputs = model.rwkv(self._ids, past_key_values=cache, use_cache=True, return_dict=True)
        logits = model.head(outputs.last_hidden_state[:, -1])
        _copy(chain(*unstacked(self._stack)), chain(*outputs.past_key_values.layers))
        return logits


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Within, no other graph is collected, which would spoil one that this thread captures."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def table_of(embeddings: Any) -> Tensor | None:
    """The embeddings as a table whose rows ids are; None where the module makes something else of them."""
    is_plain = type(embeddings) is nn.Embedding and nn.Embedding.forward.__qualname__ == "Embedding.forward"
    if not is_plain or embeddings.max_norm is not None or not are_at_hand(embeddings.weight):
        return None
    weight: Tensor = embeddings.weight
    return weight if weight.is_contiguous() else None


def rows_of(table: Tensor | None, model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, 1), and a table (any number, C) whose rows they are: that of the model, or what it makes of the ids."""
    if table is not None:
        return input_ids.long() if input_ids.dtype == torch.int32 else input_ids, table
    x = model.rwkv.embeddings(input_ids)[:, 0].contiguous()
    return torch.arange(len(x), device=x.device)[:, None], x


def _copy(to: Iterable[Tensor], parts: Any) -> None:
    torch._foreach_copy_(list(to), list(parts))
