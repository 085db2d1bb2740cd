"""The implementations of the WKV operator that `wkv.py` compares, and the float64 reference that all are held to.

A side is called as ``side(time_decay, time_first, key, value)``, of shapes (C,), (C,), (B, T, C) and (B, T, C), and
gives the output (B, T, C), differentiable in all four. A function that makes one raises ImportError, OSError or
RuntimeError, with the reason, where it cannot run.
"""

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rwkv_kernels.wkv4 import BACKENDS, EMPTY_EXPONENT, wkv4

Side = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]
NAIVE_SOURCE = Path(__file__).with_name("naive_wkv4.cu")
NAIVE_THREADS = 32  # of a block, as in the published kernels


def backend(name: str) -> Side:
    """This project's."""
    if name not in BACKENDS:
        raise RuntimeError(f"rwkv_kernels.wkv4 has no backend {name!r}")
    return lambda *inputs: wkv4(*inputs, backend=name)[0]


def fla() -> Side:
    """flash-linear-attention's Triton kernel: one program per row and 128 channels walks all steps.

    It takes ``time_decay`` as it is, and a state (B, 3, 1, C) that it joins with those after every step, which it
    writes in the dtype of the keys and reads in the backward pass.
    """
    from fla.ops.rwkv4 import fused_recurrent_rwkv4

    @cache  # one of each shape: making it is no part of the work
    def empty_state(batch: int, channels: int, device: torch.device) -> Tensor:
        state = torch.zeros(batch, 3, 1, channels, device=device)
        state[:, 2] = EMPTY_EXPONENT
        return state

    def side(time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor) -> Tensor:
        state = empty_state(key.shape[0], key.shape[2], key.device)
        return fused_recurrent_rwkv4(time_decay, time_first, key, value, state)[0]

    return side


def naive() -> Side:
    """One thread per channel, `naive_wkv4.cu`, compiled by NVRTC."""
    _naive_kernel("wkv4_forward", torch.float32)
    return Naive.apply


class Naive(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor) -> Tensor:
        w = -torch.exp(time_decay)
        output = torch.empty_like(key)
        _launch("wkv4_forward", w, time_first, key, value, output)
        ctx.save_for_backward(w, time_first, key, value)
        return output

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w, u, k, v = ctx.saved_tensors
        gw, gu = w.new_zeros(2, k.shape[0], k.shape[2])  # a launch by PyTorch: it binds this thread to the device
        gk, gv, scratch = torch.empty_like(k), torch.empty_like(v), w.new_empty(3, *k.shape)
        _launch("wkv4_backward", w, u, k, v, grad_output.contiguous(), scratch, gw, gu, gk, gv)
        return gw.sum(0) * w, gu.sum(0), gk, gv


def _launch(name: str, w: Tensor, u: Tensor, k: Tensor, *others: Tensor) -> None:
    batch, time, channels = k.shape
    blocks = (batch * channels + NAIVE_THREADS - 1) // NAIVE_THREADS
    kernel = _naive_kernel(name, k.dtype)
    kernel(grid=(blocks, 1, 1), block=(NAIVE_THREADS, 1, 1), args=[batch, time, channels, w, u, k, *others])


@cache
def _naive_kernel(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """Through PyTorch, which has NVRTC with it: nothing else is needed."""
    if not hasattr(torch.cuda, "_compile_kernel"):
        raise RuntimeError(f"torch {torch.__version__} has no torch.cuda._compile_kernel: 2.9 and later have")
    element = {torch.float32: "float", torch.bfloat16: "bfloat16"}[dtype]
    return torch.cuda._compile_kernel(f"#define ELEMENT {element}\n{NAIVE_SOURCE.read_text()}", name)


MAKERS: dict[str, dict[str, Callable[[], Side]]] = {  # by device; the first is what the others are compared with
    "cpu": {"cpu": partial(backend, "cpu"), "portable": partial(backend, "portable")},
    "cuda": {"cuda": partial(backend, "cuda"), "portable": partial(backend, "portable"), "fla": fla, "naive": naive},
}
PEERS = {"fla", "naive"}


def both(side: Side, inputs: list[Tensor], grad_output: Tensor) -> list[Tensor]:
    """Forward and backward: the output and the four gradients."""
    output = side(*inputs)
    return [output, *torch.autograd.grad(output, inputs, grad_output)]


def in_float64(inputs: list[Tensor], grad_output: Tensor, largest: int = 2**22) -> list[Tensor]:
    """What ``both`` should give: the portable backend, which the project's tests hold to the definition, in float64.

    A few channels at a time, for memory's sake: channels know nothing of each other.
    """
    rows = grad_output.shape[0] * grad_output.shape[1]
    block = max(1, largest // rows)
    parts = [
        both(backend("portable"), [x.detach().double().requires_grad_() for x in some[:4]], some[4].double())
        for some in zip(*(x.split(block, dim=-1) for x in (*inputs, grad_output)), strict=True)
    ]
    return [torch.cat([part.detach() for part in tensors], dim=-1) for tensors in zip(*parts, strict=True)]
