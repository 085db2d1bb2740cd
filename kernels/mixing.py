"""What RWKV-4 does between its matrix products: token shift and mixing, squared ReLU, gates.

Each is a line or two of plain PyTorch, its ``_reference``. That runs wherever a tensor can be; torch.compile fuses it
with its neighbours. Eager tensors on a CPU would pay a pass over memory for every operation, so for them each is one
kernel of `mixing_cpu.cpp`, compiled when it is first needed; where that cannot be had, the reference does it.

Symbols: B batch, T time steps, C channels, N sequences (N = B, or the number of packed sequences).
"""

import ctypes
import functools
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from rwkv_kernels import loader, wkv4_cpu
from rwkv_kernels.build_cache import KernelWarning
from rwkv_kernels.wkv4_native import Integer, Pointer, are_at_hand, fields

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)  # numbered as in mixing_cpu.cpp
MIXES = 3  # at most, as in mixing_cpu.cpp


class Layout(Protocol):
    """Where sequences are among the tokens.

    cu_seqlens: None where each row is one; (N + 1,) int64 on the CPU where B = 1 and sequence n, which may be of no
        tokens, is ``cu_seqlens[n]:cu_seqlens[n + 1]``.
    """

    @property
    def cu_seqlens(self) -> Tensor | None: ...

    def shift(self, x: Tensor, previous: Tensor | None) -> Tensor:
        """(B, T, C) with every token replaced by the one before it, the first by ``previous`` (N, C) or zeros."""


def shift_and_mix(x: Tensor, previous: Tensor | None, layout: Layout, *mixes: Tensor) -> tuple[Tensor, ...]:
    """``mix * x + (1 - mix) * layout.shift(x, previous)`` for each mix: between a token and the one before it.

    Args:
        x: (B, T, C) of any float.
        previous: (N, C) of any float, what comes before each sequence; None for zeros.
        layout: where sequences begin.
        mixes: up to ``MIXES`` of any float and of C elements, for the channels.

    Returns:
        A tensor (B, T, C) in the dtype of ``x`` for each mix. Inputs are never modified.

    Raises:
        ValueError: an argument that does not fit ``x``; names it.
    """
    _check(x, previous, layout.cu_seqlens, mixes)
    if not _is_native(x, previous, *mixes):
        return shift_and_mix_reference(x, previous, layout, *mixes)
    vectors = [mix.to(x.dtype) for mix in mixes]
    previous = None if previous is None else previous.to(x.dtype)
    run = _shift_and_mix_operator if _is_differentiated(x, previous, *vectors) else _shift_and_mix
    return tuple(run(x, previous, layout.cu_seqlens, vectors))


def squared_relu(x: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * relu(x)^2``, of which only the result need be in the range of the dtype."""
    if not _is_native(x):
        return squared_relu_reference(x, scale)
    return (_squared_relu_operator if _is_differentiated(x) else _squared_relu)(x, scale)


def gate(receptance: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    """``scale * sigmoid(receptance) * x``."""
    alike = x.shape == receptance.shape and x.dtype == receptance.dtype
    if not alike or not _is_native(x, receptance):
        return gate_reference(receptance, x, scale)
    return (_gate_operator if _is_differentiated(receptance, x) else _gate)(receptance, x, scale)


def shift_and_mix_reference(x: Tensor, previous: Tensor | None, layout: Layout, *mixes: Tensor) -> tuple[Tensor, ...]:
    """:func:`shift_and_mix` in plain PyTorch, on any device."""
    shifted = layout.shift(x, previous)
    return tuple(torch.lerp(shifted, x, mix.to(x.dtype)) for mix in mixes)


def squared_relu_reference(x: Tensor, scale: float = 1.0) -> Tensor:
    """:func:`squared_relu` in plain PyTorch, on any device."""
    x = torch.relu(x)
    return _scaled(x, scale) * x


def gate_reference(receptance: Tensor, x: Tensor, scale: float = 1.0) -> Tensor:
    """:func:`gate` in plain PyTorch, on any device."""
    return _scaled(torch.sigmoid(receptance) * x, scale)


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale


def _check(x: Tensor, previous: Tensor | None, cu_seqlens: Tensor | None, mixes: tuple[Tensor, ...]) -> None:
    if x.ndim != 3 or not x.is_floating_point():
        raise ValueError(f"x is {x.dtype} {tuple(x.shape)}: expected floats (batch, time, channels)")
    rows, _, channels = x.shape
    if not 0 < len(mixes) <= MIXES:
        raise ValueError(f"there are {len(mixes)} mixes: expected 1 to {MIXES}")
    for mix in mixes:
        if mix.numel() != channels or mix.shape[-1:] != (channels,):
            raise ValueError(f"a mix has shape {tuple(mix.shape)}: expected one number per channel, ({channels},)")
    if cu_seqlens is not None:
        if rows != 1:
            raise ValueError(f"x has batch size {rows}: with cu_seqlens, lay the sequences end to end in batch 1")
        rows = cu_seqlens.shape[0] - 1
    if previous is not None and previous.shape != (rows, channels):
        raise ValueError(f"previous has shape {tuple(previous.shape)}: expected {(rows, channels)}")


# The kernels of mixing_cpu.cpp.


class _Arguments(ctypes.Structure):
    _fields_ = (
        fields(Integer, "sequences time channels threads")
        + fields(Pointer, "bounds x previous")
        + fields(Pointer * MIXES, "mix output grad_output")
        + fields(Pointer, "grad_x grad_previous")
        + fields(Pointer * MIXES, "grad_mix")
    )


class _Elements(ctypes.Structure):
    _fields_ = (
        fields(Integer, "count threads")
        + fields(ctypes.c_double, "scale")
        + fields(Pointer, "a b y grad_y grad_a grad_b")
    )


@functools.cache
def _library() -> Any:
    library = loader.cpu_library("mixing_cpu.cpp")
    dtype, backwards, mixes, arguments = ctypes.c_int, ctypes.c_bool, ctypes.c_int, ctypes.c_void_p
    library.shift_and_mix_cpu.argtypes, library.shift_and_mix_cpu.restype = (
        (dtype, backwards, mixes, arguments),
        ctypes.c_bool,
    )
    for run in (library.squared_relu_cpu, library.gate_cpu):
        run.argtypes, run.restype = (dtype, backwards, arguments), None
    return library


@functools.cache
def _can_load() -> bool:
    """Where WKV cannot be had either, :func:`wkv4.choose_backend` warns, and once is enough."""
    try:
        _library()
    except loader.Unavailable as error:
        if _wkv_can_load():
            reason = f"Token shift and gates run as plain PyTorch, which is slower: {error}"
            warnings.warn(reason, KernelWarning, stacklevel=5)
        return False
    return True


def _wkv_can_load() -> bool:
    try:
        wkv4_cpu.load(torch.device("cpu"))
    except loader.Unavailable:
        return False
    return True


def _is_native(x: Tensor, *others: Tensor | None) -> bool:
    """Whether the kernels may run now, on ``x`` and what goes with it."""
    on_cpu = all(t is None or t.is_cpu for t in (x, *others))
    return on_cpu and x.dtype in DTYPES and are_at_hand(x, *others) and _can_load()


def _is_differentiated(*inputs: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


def _shift_and_mix(
    x: Tensor, previous: Tensor | None, cu_seqlens: Tensor | None, mixes: Sequence[Tensor]
) -> list[Tensor]:
    x = x.contiguous()
    outputs = [torch.empty_like(x) for _ in mixes]
    _run_mix(False, x, previous, cu_seqlens, mixes, output=outputs)
    return outputs


def _shift_and_mix_backward(
    grad_outputs: Sequence[Tensor],
    x: Tensor,
    previous: Tensor | None,
    cu_seqlens: Tensor | None,
    mixes: Sequence[Tensor],
) -> list[Tensor]:
    """Gradients of ``x``, of ``previous`` (of no elements without one) and of the mixes."""
    x, wide = x.contiguous(), torch.promote_types(x.dtype, torch.float32)
    grad_x = torch.empty_like(x)
    grad_previous = x.new_zeros(0 if previous is None else previous.shape)
    grad_mixes = [torch.empty_like(mix, dtype=wide, memory_format=torch.contiguous_format) for mix in mixes]
    _run_mix(
        True, x, previous, cu_seqlens, mixes,
        grad_output=[gradient.resolve_neg().contiguous() for gradient in grad_outputs],
        grad_x=grad_x, grad_previous=grad_previous, grad_mix=grad_mixes,
    )  # fmt: skip
    return [grad_x, grad_previous, *(gradient.to(x.dtype) for gradient in grad_mixes)]


def _run_mix(
    backwards: bool,
    x: Tensor,
    previous: Tensor | None,
    cu_seqlens: Tensor | None,
    mixes: Sequence[Tensor],
    **more: Tensor | Sequence[Tensor],
) -> None:
    rows, time, channels = x.shape
    bounds = None if cu_seqlens is None else cu_seqlens.to("cpu", torch.int64).contiguous()
    tensors = {
        "bounds": bounds,
        "x": x,
        "previous": None if previous is None else previous.contiguous(),
        "mix": [mix.contiguous() for mix in mixes],
    } | more
    arguments = _Arguments(
        rows if bounds is None else len(bounds) - 1, time, channels, torch.get_num_threads(), **_pointers(tensors)
    )
    if not _library().shift_and_mix_cpu(DTYPES.index(x.dtype), backwards, len(mixes), ctypes.byref(arguments)):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens}: expected to start at 0, never to decrease, and to end at the number of "
            f"tokens, {time}"
        )


def _pointers(tensors: Mapping[str, Tensor | Sequence[Tensor] | None]) -> dict[str, Any]:
    """The fields of a structure, which does not keep the tensors."""
    return {
        name: x.data_ptr() if isinstance(x, Tensor) else (Pointer * MIXES)(*(each.data_ptr() for each in x))
        for name, x in tensors.items()
        if x is not None
    }


def _squared_relu(x: Tensor, scale: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _run(_library().squared_relu_cpu, False, scale, a=x, y=y)
    return y


def _squared_relu_backward(grad_y: Tensor, x: Tensor, scale: float) -> Tensor:
    x = x.contiguous()
    gradient = torch.empty_like(x)
    _run(_library().squared_relu_cpu, True, scale, a=x, grad_y=grad_y.resolve_neg().contiguous(), grad_a=gradient)
    return gradient


def _gate(receptance: Tensor, x: Tensor, scale: float) -> Tensor:
    x = x.contiguous()
    y = torch.empty_like(x)
    _run(_library().gate_cpu, False, scale, a=receptance.contiguous(), b=x, y=y)
    return y


def _gate_backward(grad_y: Tensor, receptance: Tensor, x: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    receptance, x = receptance.contiguous(), x.contiguous()
    grad_receptance, grad_x = torch.empty_like(receptance), torch.empty_like(x)
    _run(
        _library().gate_cpu, True, scale,
        a=receptance, b=x, grad_y=grad_y.resolve_neg().contiguous(), grad_a=grad_receptance, grad_b=grad_x,
    )  # fmt: skip
    return grad_receptance, grad_x


def _run(kernel: Any, backwards: bool, scale: float, **tensors: Tensor) -> None:
    a = tensors["a"]
    arguments = _Elements(a.numel(), torch.get_num_threads(), scale, **_pointers(tensors))
    kernel(DTYPES.index(a.dtype), backwards, ctypes.byref(arguments))


# The same as operators of PyTorch, which can be differentiated; a call of one takes 30 microseconds.


def _operator(name: str, run: Callable[..., Any], fake: Callable[..., Any]) -> torch.library.CustomOpDef:
    operator = torch.library.custom_op(f"rwkv::{name}", run, mutates_args=())
    operator.register_fake(fake)
    return operator


def _like(x: Tensor, shape: Any = None) -> Tensor:
    return x.new_empty(x.shape if shape is None else shape)


_shift_and_mix_operator = _operator(
    "shift_and_mix", _shift_and_mix, lambda x, previous, cu_seqlens, mixes: [_like(x) for _ in mixes]
)
_shift_and_mix_backward_operator = _operator(
    "shift_and_mix_backward",
    _shift_and_mix_backward,
    lambda grad_outputs, x, previous, cu_seqlens, mixes: [
        _like(x),
        _like(x, 0) if previous is None else _like(previous),
        *map(_like, mixes),
    ],
)
_squared_relu_operator = _operator("squared_relu", _squared_relu, lambda x, scale: _like(x))
_squared_relu_backward_operator = _operator(
    "squared_relu_backward", _squared_relu_backward, lambda grad_y, x, scale: _like(x)
)
_gate_operator = _operator("gate", _gate, lambda receptance, x, scale: _like(x))
_gate_backward_operator = _operator(
    "gate_backward", _gate_backward, lambda grad_y, receptance, x, scale: (_like(x), _like(x))
)


def _save_mix(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    x, previous, cu_seqlens, mixes = inputs
    ctx.save_for_backward(x, previous, cu_seqlens, *mixes)


def _differentiate_mix(ctx: Any, grad_outputs: list[Tensor]) -> tuple[Any, ...]:
    x, previous, cu_seqlens, *mixes = ctx.saved_tensors
    grad_x, grad_previous, *grad_mixes = _shift_and_mix_backward_operator(grad_outputs, x, previous, cu_seqlens, mixes)
    return grad_x, None if previous is None else grad_previous, None, grad_mixes


def _save(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    *tensors, ctx.scale = inputs
    ctx.save_for_backward(*tensors)


_shift_and_mix_operator.register_autograd(_differentiate_mix, setup_context=_save_mix)
_squared_relu_operator.register_autograd(
    lambda ctx, grad_y: (_squared_relu_backward_operator(grad_y, *ctx.saved_tensors, ctx.scale), None),
    setup_context=_save,
)
_gate_operator.register_autograd(
    lambda ctx, grad_y: (*_gate_backward_operator(grad_y, *ctx.saved_tensors, ctx.scale), None),
    setup_context=_save,
)
