"""The initialisation of the paper, as its training code (RWKV-LM, v4neo) does it.

Symbols: C channels, L layers.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import initialization as init


def linear(inputs: int, outputs: int, init_gain: float = 1.0) -> nn.Linear:
    """A matrix that starts orthogonal with this gain, or at zero."""
    module = nn.Linear(inputs, outputs, bias=False)
    module.init_gain = init_gain  # type: ignore[assignment]
    return module


def init_time_mix(module: Any, num_layers: int) -> None:
    """The vectors of a RwkvTimeMix: channels from the longest memory to the shortest."""
    depth = module.layer_idx / max(num_layers - 1, 1)
    shallowness = 1 - module.layer_idx / num_layers
    channels = module.time_decay.numel()
    channel = torch.arange(channels, dtype=torch.float32, device=module.time_decay.device)
    init.copy_(module.time_decay, -5 + 8 * (channel / max(channels - 1, 1)) ** (0.7 + 1.3 * depth))
    init.copy_(module.time_first, math.log(0.3) + 0.5 * ((channel + 1) % 3 - 1))
    ramp = _ramp(module.time_mix_key)
    init.copy_(module.time_mix_key, ramp**shallowness)
    init.copy_(module.time_mix_value, ramp**shallowness + 0.3 * depth)
    init.copy_(module.time_mix_receptance, ramp ** (0.5 * shallowness))


def init_channel_mix(module: Any, num_layers: int) -> None:
    """The vectors of a RwkvChannelMix."""
    mix = _ramp(module.time_mix_key) ** (1 - module.layer_idx / num_layers)
    init.copy_(module.time_mix_key, mix)
    init.copy_(module.time_mix_receptance, mix)


def init_linear(module: nn.Linear) -> None:
    """Orthogonal, or zero where the module says so, computed in float32 whatever the dtype of the weights."""
    gain = getattr(module, "init_gain", 1.0)
    if gain == 0:
        init.zeros_(module.weight)
    elif not getattr(module.weight, "_is_hf_initialized", False):
        outputs, inputs = module.weight.shape
        weight = torch.empty_like(module.weight, dtype=torch.float32)
        init.orthogonal_(weight, gain=gain * math.sqrt(max(1, outputs / inputs)))
        init.copy_(module.weight, weight)
    if module.bias is not None:
        init.zeros_(module.bias)


def _ramp(like: Tensor) -> Tensor:
    """i / C for every channel i, in the shape of ``like`` and float32."""
    channels = like.numel()
    return (torch.arange(channels, dtype=torch.float32, device=like.device) / channels).view(like.shape)
