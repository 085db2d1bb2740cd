"""What the laws of the WKV-4 operator are tried on: inputs, their parts, and ways to compare.

Symbols: B batch, T time steps, C channels, N sequences. An input is a dict of the arguments.
"""

import functools
import itertools

import pytest
import torch
from torch import Tensor

from rwkv_kernels.wkv4 import BACKENDS, wkv4, wkv4_reference

FAST = [name for name in BACKENDS if name != "reference"]
EXACT = (
    "cpu",
    "portable",
    "reference",
)  # the same bits whatever is beside a channel, after a token or around a sequence
TIMES = (1, 2, 31, 129, 1000)
KEYS = 3.0  # the size of ordinary keys
DIFFERENTIABLE = ("time_decay", "time_first", "key", "value", "state")

# Sequences of no token and of one, and one long among many short; they add up to T.
LENGTHS = {
    1: (0, 1, 0),
    2: (1, 0, 1),
    31: (0, 1, 29, 1, 0),
    129: (1, 0, 0, 96, 32),
    1000: (0, 1, 3, 801, 0, 31, 32, 33, 99, 0),
}

# Every dtype with keys that overflow a naive exponential, every layout, and keys as models have.
SITUATIONS = {
    "float32": {},
    "float32-wild-sliced": {"keys": 80.0, "layout": "sliced"},
    "bfloat16-wild-transposed": {"keys": 80.0, "layout": "transposed", "dtype": torch.bfloat16},
    "float16-wild-sliced": {"keys": 80.0, "layout": "sliced", "dtype": torch.float16},
    "bfloat16": {"dtype": torch.bfloat16},
    # Tokens that can share one exponent, none that can, and both: kernels go two ways.
    "float32-near": {"decay": 1.5, "bonus": (-18.0, 3.5)},
    "float32-far": {"decay": 6.0, "bonus": (-90.0, 90.0)},
    "float32-mixed": {"keys": 14.0, "decay": 6.0},
}

# Two runs of the same sum in another order. Exponents of 80 are known to 4e-6 in float32.
TOLERANCE = {
    torch.float64: {"rtol": 1e-11, "atol": 1e-11},
    torch.float32: {"rtol": 1e-4, "atol": 1e-4},
    torch.float16: {"rtol": 2e-3, "atol": 2e-3},
    torch.bfloat16: {"rtol": 1.6e-2, "atol": 1.6e-2},
}


def device_of(backend: str) -> str:
    return "cuda" if backend == "cuda" else "cpu"


@functools.cache
def why_not(backend: str, dtype: torch.dtype) -> str | None:
    """Why a native backend cannot run here. What is plain PyTorch has no excuse."""
    if backend in ("portable", "reference"):
        return None
    if device_of(backend) == "cuda" and not torch.cuda.is_available():
        return "no CUDA device"
    if backend == "cuda" and dtype == torch.float64:
        return "it does not compute float64"
    try:
        wkv4(**make(2, backend, dtype=dtype), backend=backend)
    except RuntimeError as error:
        return str(error)
    return None


def require(backend: str, dtype: torch.dtype = torch.float32) -> None:
    """Skip the test, with the reason, where ``backend`` cannot run ``dtype`` on this machine."""
    if reason := why_not(backend, dtype):
        pytest.skip(f"{backend}, {dtype}: {reason}")


def make(
    time: int,
    backend: str = "portable",
    *,
    batch: int = 2,
    channels: int = 37,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    keys: float = KEYS,
    decay: float = 3.0,
    bonus: tuple[float, float] = (-2.0, 2.0),
    packed: bool = False,
    lengths: tuple[int, ...] = (),
    seed: int = 0,
) -> dict:
    """Random arguments of ``wkv4``: decays from e^-8 to e^``decay``, u within ``bonus``, keys (and states) up to
    +-``keys``.

    Sequence 0 starts from zeros, the others from a history. What a sliced layout skips is NaN.
    """
    generator = torch.Generator().manual_seed(1000 * seed + time)
    device = device_of(backend)
    lengths = lengths or (LENGTHS[time] if packed else ())
    if lengths:
        batch, time = 1, sum(lengths)
    sequences = len(lengths) or batch
    wide = torch.promote_types(dtype, torch.float32)

    def uniform(low: float, high: float, *shape: int, dtype: torch.dtype = wide) -> Tensor:
        x = torch.rand(shape, generator=generator, dtype=torch.float64) * (high - low) + low
        return place(x.to(dtype).to(device), layout)

    state = torch.stack(
        [
            uniform(-3, 3, sequences, channels),
            uniform(0.5, 2, sequences, channels),
            uniform(-keys, keys, sequences, channels),
        ],
        dim=1,
    )
    state[0] = 0
    return {
        "time_decay": uniform(-8, decay, channels),
        "time_first": uniform(*bonus, channels),
        "key": uniform(-keys, keys, batch, time, channels, dtype=dtype),
        "value": uniform(-3, 3, batch, time, channels, dtype=dtype),
        "state": place(state, layout),
        "cu_seqlens": bounds(lengths).to(device) if lengths else None,
    }


def place(x: Tensor, layout: str) -> Tensor:
    """``x`` with other strides: cut out of a larger tensor that is NaN elsewhere, or transposed."""
    if layout == "sliced":
        where = tuple(slice(2, 2 + 2 * n, 2) if i == x.ndim - 1 else slice(1, 1 + n) for i, n in enumerate(x.shape))
        larger = x.new_full([2 * n + 5 for n in x.shape], torch.nan)
        larger[where] = x
        return larger[where]
    if layout == "transposed" and x.ndim > 1:
        return x.transpose(-1, -2).contiguous().transpose(-1, -2)
    return x


def bounds(lengths: tuple[int, ...]) -> Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def head(x: dict, s: int) -> dict:
    """The first ``s`` tokens; sequences that begin later are there and empty."""
    cu = x["cu_seqlens"]
    return x | {
        "key": x["key"][:, :s],
        "value": x["value"][:, :s],
        "cu_seqlens": None if cu is None else cu.clamp(max=s),
    }


def tail(x: dict, s: int, state: Tensor | None) -> dict:
    """The tokens from ``s`` on, from ``state``."""
    cu = x["cu_seqlens"]
    return x | {
        "key": x["key"][:, s:],
        "value": x["value"][:, s:],
        "state": state,
        "cu_seqlens": None if cu is None else (cu - s).clamp(min=0),
    }


def alone(x: dict) -> list[dict]:
    """Every row of a batch, or every sequence of a pack, as a batch of one."""
    if x["cu_seqlens"] is None:
        tokens = [(slice(n, n + 1), slice(None)) for n in range(len(x["key"]))]
    else:
        cu = x["cu_seqlens"].tolist()
        tokens = [(slice(None), slice(a, b)) for a, b in itertools.pairwise(cu)]
    return [
        x | {"key": x["key"][at], "value": x["value"][at], "state": x["state"][n : n + 1]} | {"cu_seqlens": None}
        for n, at in enumerate(tokens)
    ]


def together(x: dict, outputs: list[Tensor]) -> Tensor:
    """The outputs of ``alone(x)`` where they belong."""
    return torch.cat(outputs, dim=0 if x["cu_seqlens"] is None else 1)


def readout(state: Tensor) -> Tensor:
    """What a state (N, 3, C) stands for, whatever its scale: A / B and log B, (N, 2, C)."""
    a, b, p = state.unbind(1)
    empty = b == 0
    b = b.masked_fill(empty, 1)
    return torch.stack([a / b, (b.log() + p.detach())], dim=1).masked_fill(empty[:, None], 0)


def leaves(x: dict, names: tuple[str, ...] = DIFFERENTIABLE) -> dict:
    """The same tensors, in the same places, as leaves of a new graph."""
    return x | {name: x[name].detach().requires_grad_() for name in names}


def cotangents(x: dict) -> tuple[Tensor, Tensor]:
    """Random gradients of the output and of the readout of the final state, the same numbers in every dtype."""
    generator = torch.Generator().manual_seed(99)
    key, state = x["key"], x["state"]
    return tuple(
        torch.randn(shape, generator=generator, dtype=torch.float64).bfloat16().to(like.dtype).to(like.device)
        for shape, like in ((key.shape, key), ((len(state), 2, state.shape[-1]), state))
    )


def differentiate(x: dict, run) -> tuple[Tensor, Tensor, dict]:
    """Output and final state of ``run(x)``, and the gradients of the five inputs by name."""
    x = leaves(x)
    output, state = run(x)
    inputs = {name: x[name] for name in DIFFERENTIABLE}
    grads = torch.autograd.grad([output, readout(state)], list(inputs.values()), list(cotangents(x)))
    return output.detach(), state.detach(), dict(zip(inputs, grads, strict=True))


def runner(backend: str):
    return lambda x: wkv4(**x, backend=backend)


def in_double(x: dict) -> dict:
    return {name: v.double() if v is not None and v.is_floating_point() else v for name, v in x.items()}


@functools.cache
def truth(time: int, situation: str, packed: bool, double: bool) -> dict:
    """All results of the sequential reference, in float64 or in the dtype of the situation."""
    x = make(time, packed=packed, **SITUATIONS[situation])
    x = in_double(x) if double else x
    output, end, grads = differentiate(x, lambda x: wkv4_reference(**x))
    return {"output": output, "end": readout(end)} | grads


def agree(actual, expected, exact: bool = False, dtype: torch.dtype = torch.float32) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else TOLERANCE[dtype]
    torch.testing.assert_close(actual, expected, **tolerance)
