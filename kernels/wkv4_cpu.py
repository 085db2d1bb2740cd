"""WKV-4 on a CPU, in C++: the tensors for `wkv4_cpu.cpp`, which is compiled when it is first needed.

Symbols: B batch, T time steps, C channels, N sequences, M tokens of all sequences.
"""

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

from rwkv_kernels import loader
from rwkv_kernels.wkv4_native import Arguments, Integer, Pointer, Sequences, fields, rows

TILE = 64  # as in wkv4_cpu.cpp
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # numbered as in wkv4_cpu.cpp


class _Arguments(Arguments):
    _fields_ = (
        fields(Integer, "sequences time channels threads")
        + fields(Pointer, "bounds time_decay time_first")
        + fields(Sequences, "key value")
        + fields(Pointer, "state tiles output final_state")
        + fields(Sequences, "grad_output")
        + fields(Pointer, "grad_state grad_decay grad_first grad_key grad_value grad_initial")
    )


@functools.cache
def _library() -> Any:
    run = loader.cpu_library("wkv4_cpu.cpp").wkv4_cpu
    run.argtypes, run.restype = (ctypes.c_int, ctypes.c_bool, ctypes.c_void_p), None
    return run


def load(device: torch.device) -> None:
    """Make ready to run. Raises :class:`loader.Unavailable`, which says why that cannot be."""
    _library()


def forward(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    tiles: Tensor,
) -> tuple[Tensor, Tensor]:
    """Output (B, T, C) and final state (N, 3, C), from the checked arguments of ``wkv4``; key is not empty.

    tiles: (M // TILE + N, 3, C) in the dtype of the state, to be filled with what ``backward`` needs; or empty.
    """
    output, final_state = key.new_empty(key.shape), state.new_empty(state.shape)
    arguments = _arguments(
        time_decay, time_first, key, value, state, cu_seqlens, tiles, output=output, final_state=final_state
    )
    _library()(DTYPES.index(key.dtype), False, ctypes.byref(arguments))
    return output, final_state


def backward(
    grad_output: Tensor,
    grad_state: Tensor,
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    tiles: Tensor,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of the first five arguments of ``wkv4``, from what ``forward`` left in ``tiles``; key is not empty."""
    grad_key, grad_value, initial = key.new_empty(key.shape), key.new_empty(key.shape), state.new_empty(state.shape)
    decay, first = state.new_empty(key.shape[-1]), state.new_empty(key.shape[-1])
    arguments = _arguments(
        time_decay, time_first, key, value, state, cu_seqlens, tiles,
        grad_output=rows(grad_output), grad_state=grad_state.contiguous(),
        grad_decay=decay, grad_first=first, grad_key=grad_key, grad_value=grad_value, grad_initial=initial,
    )  # fmt: skip
    _library()(DTYPES.index(key.dtype), True, ctypes.byref(arguments))
    return decay.to(time_decay.dtype), first.to(time_first.dtype), grad_key, grad_value, initial


def _arguments(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    tiles: Tensor,
    **more: Tensor,
) -> _Arguments:
    return _Arguments(
        sequences=len(state),
        time=key.shape[1],
        channels=key.shape[2],
        threads=torch.get_num_threads(),
        bounds=None if cu_seqlens is None else cu_seqlens.to("cpu", torch.int64).contiguous(),
        time_decay=time_decay.to(state.dtype).contiguous(),
        time_first=time_first.to(state.dtype).contiguous(),
        key=rows(key),
        value=rows(value),
        state=state.contiguous(),
        tiles=tiles,
        **more,
    )
