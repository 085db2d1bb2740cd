"""The state that sequences begin with, in place of an empty one: what state tuning learns.

Symbols: L blocks, N sequences, C channels of the residual stream, A channels of the WKV operator.
"""

import os
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from modeling_rwkv.cache import LayerState, RwkvCache
from modeling_rwkv.configuration_rwkv import RwkvConfig

FILE = "state.safetensors"  # its name in a folder
WEIGHTLESS = -1e4  # the logarithm of the weight of a past that there is none of


class RwkvInitialState(nn.Module):
    """Where a model with ``config.initial_state`` begins every sequence.

    time_mix, channel_mix: (L, C), what the first token's token shift finds before it. value: (L, A), the average over
    the past that its time mixing finds, and weight: (L, A), the logarithm of how much that past weighs, in the units
    of keys. It stands for the WKV state a = value, b = 1, p = weight.
    """

    def __init__(self, config: RwkvConfig) -> None:
        super().__init__()
        layers, channels, attention = config.num_hidden_layers, config.hidden_size, config.attention_hidden_size
        self.time_mix = nn.Parameter(torch.empty(layers, channels))
        self.channel_mix = nn.Parameter(torch.empty(layers, channels))
        self.value = nn.Parameter(torch.empty(layers, attention))
        self.weight = nn.Parameter(torch.empty(layers, attention))

    def forward(self, idx: int, dtype: torch.dtype) -> LayerState:
        """The state of block ``idx`` with one row; token-shift inputs in ``dtype``."""
        weight = self.weight[idx].to(torch.promote_types(self.weight.dtype, torch.float32))
        value = self.value[idx].to(weight.dtype)
        b = torch.exp(weight - weight.detach())  # 1, with the gradient of the weight
        wkv = torch.stack([value * b, b, weight.detach()])
        return LayerState(self.time_mix[idx : idx + 1].to(dtype), self.channel_mix[idx : idx + 1].to(dtype), wkv[None])

    @torch.no_grad()
    def set(self, cache: RwkvCache | None) -> None:
        """Begin where ``cache``, of one row, stopped; None: with an empty state."""
        if cache is None:
            for parameter in self.parameters():
                parameter.zero_()
            self.weight.fill_(WEIGHTLESS)
            return
        for idx, state in enumerate(cache.layers):
            a, b, p = state.wkv[0]
            self.time_mix[idx] = state.time_mix[0]
            self.channel_mix[idx] = state.channel_mix[0]
            self.value[idx] = torch.where(b == 0, 0, a / b)
            self.weight[idx] = torch.where(b == 0, WEIGHTLESS, p + b.log())

    @torch.no_grad()
    def cache(self, rows: int = 1) -> RwkvCache:
        """The same as a cache that has read nothing, to be saved or passed as ``past_key_values``."""
        cache = RwkvCache()
        layers = [self(idx, self.time_mix.dtype) for idx in range(len(self.value))]
        cache.layers = [LayerState(*(part.repeat(rows, *[1] * (part.ndim - 1)) for part in layer)) for layer in layers]
        return cache


def read_initial_state(path: str | os.PathLike | RwkvCache, model: PreTrainedModel) -> RwkvCache:
    """A state to begin with, from a cache, a file or a folder with a file ``FILE``, once it is known to fit a model.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is no state, is empty or has several rows, or is of another model.
    """
    if isinstance(path, RwkvCache):
        name, cache = "the state", path
    else:
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        name, cache = f"the state in {path}", RwkvCache.load(path, model=model)
    if not cache.layers:
        raise ValueError(f"{name} is empty: run a model on some tokens first, or give None to begin with nothing")
    if cache.batch_size != 1:
        raise ValueError(f"{name} has {cache.batch_size} rows: a model begins with one; select a row of it")
    cache.check_sizes(model.config, name)
    return cache
