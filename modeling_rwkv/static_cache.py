"""A state that is written over, token by token, and the CUDA graph of a model that does so.

`generate(..., cache_implementation="static")` uses them.
"""

import threading
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils import logging

from modeling_rwkv.cache import LayerState, RwkvCache
from modeling_rwkv.stacked_layers import StackedLayers
from rwkv_kernels.decode_cuda import Decoder
from rwkv_kernels.decode_weights import Stack

logger = logging.get_logger(__name__)

WARM_UPS = 2  # passes before a graph is captured: libraries choose and allocate in the first


class RwkvStaticCache(RwkvCache):
    """An :class:`RwkvCache` whose tensors are used again: what ``layers`` held is gone after the next tokens.

    On a GPU one more token of a batch of any size then costs no allocation and next to no work of the CPU. A
    :meth:`clone` keeps a state. Until `generate` is given it again, or :meth:`reset`, weights may be edited in place
    but not replaced or moved, nor adapters switched.

    plan: how its model, held weakly, computes its next token, see decoding.py; copies find their own.
    """

    def __init__(self) -> None:
        super().__init__()
        self.plan: tuple[weakref.ref[Any], Any] | None = None
        self._pair: tuple[StackedLayers, StackedLayers] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"plan": None, "_pair": None}

    def _apply(self, change: Any) -> None:
        """What `detach` and `to` return is not written over either."""

        def apart(x: Tensor) -> Tensor:
            y: Tensor = change(x)
            return y.clone() if y.data_ptr() == x.data_ptr() else y

        super()._apply(apart)

    def reset(self) -> None:
        super().reset()
        self.plan = None

    def other_than(self, layers: StackedLayers) -> StackedLayers:
        """Room for the states after those in ``layers``: two take turns."""
        if self._pair is None or not any(layers is one for one in self._pair):
            self._pair = layers, layers.empty_like()
        return self._pair[layers is self._pair[0]]


class Replay:
    """One token of a model, for a batch of B rows on one stream, as a CUDA graph. One cache at a time lives in it."""

    def __init__(self, model: Any, decoder: Decoder | None, layers: Sequence[LayerState]) -> None:
        """decoder: of the model, if there is one; layers: states, whose shapes and dtypes are those to come."""
        device = layers[0].wkv.device
        self._decoder = decoder
        self._lock = threading.Lock()
        self._owner: weakref.ref[RwkvCache] = weakref.ref(RwkvCache())
        self._ids = torch.zeros((len(layers[0].wkv), 1), dtype=torch.int64, device=device)
        self._layers = StackedLayers(Stack.of(layers))
        stream, current = torch.cuda.Stream(device), torch.cuda.current_stream(device)
        stream.wait_stream(current)
        with torch.cuda.stream(stream):
            for _ in range(WARM_UPS):
                self._read(model)
        current.wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, stream=stream, capture_error_mode="thread_local"):
            self._logits = self._read(model)

    @classmethod
    def of(cls, model: Any, decoder: Decoder | None, layers: Sequence[LayerState]) -> "Replay | None":
        """None, and a warning, where something in the model cannot be captured."""
        devices = {x.device for x in model.parameters()}
        if len(devices) > 1:
            return None
        current = torch.cuda.current_stream(layers[0].wkv.device)  # PyTorch does not return to it from a failure
        try:
            with torch.inference_mode(False), torch.no_grad(), torch.cuda.stream(current):
                return cls(model, decoder, layers)
        except RuntimeError as error:
            reason = str(error).partition("\n")[0]
            random = torch.cuda.default_generators[current.device_index]
            random.graphsafe_set_state(random.clone_state())  # before 2.13, the old one still counts for the capture
            logger.warning(f"There is no CUDA graph of this model ({reason}): tokens are computed module by module.")
            return None

    def step(self, input_ids: Tensor, cache: RwkvCache) -> tuple[Tensor, StackedLayers]:
        """Logits (B, V) after one more token (B, 1) of ``cache``, and its states after it."""
        with self._lock:
            if cache.layers is not self._layers:
                owner = self._owner()
                if owner is not None and owner.layers is self._layers:
                    owner.layers = [LayerState(*map(torch.clone, layer)) for layer in self._layers]
                _copy(self._layers, cache.layers)
                self._owner = weakref.ref(cache)
            self._ids.copy_(input_ids)
            self._graph.replay()
            return self._logits.clone(), self._layers

    def _read(self, model: Any) -> Tensor:
        if self._decoder is not None:
            before = self._layers.stack
            after = before.empty_like() if len(self._ids) <= self._decoder.few else before
            logits = self._decoder.step(*table_of(model, self._ids), before, after)
            if logits is not None:
                if after is not before:
                    torch._foreach_copy_(list(before), list(after))
                return logits
        cache = RwkvCache()
        cache.layers, cache.seen_tokens = list(self._layers), 1
        outputs = model.rwkv(self._ids, past_key_values=cache, use_cache=True, return_dict=True)
        logits = model.head(outputs.last_hidden_state[:, -1])
        _copy(self._layers, cache.layers)
        return logits


def table_of(model: Any, input_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Ids (B, 1), and a table (any number, C) whose rows they are: the embeddings, or what these make of the ids."""
    embeddings = model.rwkv.embeddings
    if type(embeddings) is nn.Embedding and embeddings.max_norm is None:
        return input_ids, embeddings.weight
    x = embeddings(input_ids)[:, 0].contiguous()
    return torch.arange(len(x), device=x.device)[:, None], x


def _copy(to: Sequence[LayerState], layers: Sequence[LayerState]) -> None:
    torch._foreach_copy_([x for layer in to for x in layer], [x for layer in layers for x in layer])
