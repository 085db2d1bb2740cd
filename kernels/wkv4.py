"""The WKV operator of RWKV-4: one function, a readable reference, and a seam for faster ones.

Symbols: B batch, T time steps, C channels, N sequences (N = B, or the number of packed sequences).

Per channel, with decay ``w = -exp(time_decay)`` and bonus ``u = time_first`` (Peng et al. 2023,
"RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048, equations 16-18, appendix D)::

    y_t = (A_{t-1} + e^{u+k_t} v_t) / (B_{t-1} + e^{u+k_t})
    A_t = e^w A_{t-1} + e^{k_t} v_t
    B_t = e^w B_{t-1} + e^{k_t}

The state of a channel is ``(a, b, p)``, standing for ``A = a e^p`` and ``B = b e^p``. The exponent
``p`` is a scale and not a quantity: its gradient is zero by definition, and gradients through ``a``
and ``b`` are then exact.
"""

import functools
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rwkv_kernels import loader, wkv4_cpu, wkv4_cuda, wkv4_portable
from rwkv_kernels.build_cache import KernelWarning
from rwkv_kernels.wkv4_native import are_at_hand, are_transformed

EMPTY_EXPONENT = wkv4_portable.EMPTY_EXPONENT
BACKENDS = {
    "cpu": "C++, compiled when it is first needed: float16, bfloat16, float32 and float64 on a CPU",
    "cuda": "CUDA C++, compiled when it is first needed: float16, bfloat16 and float32 on an NVIDIA GPU",
    "portable": "plain PyTorch: runs on every device and dtype, parallel over time",
    "reference": "sequential, for checking other implementations: runs only where it is asked for",
}
NATIVE = {"cpu": wkv4_cpu, "cuda": wkv4_cuda}  # by the type of device that each is for
_IMPLEMENTATIONS = NATIVE | {"portable": wkv4_portable}


def wkv4(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Attention without attention: the average over the past, and the state that continues it.

    Args:
        time_decay: (C,) any float. A step multiplies the past by ``exp(-exp(time_decay))``.
        time_first: (C,) any float. The bonus of the current token.
        key: (B, T, C) float16, bfloat16, float32 or float64, any strides.
        value: (B, T, C) as ``key``.
        state: (N, 3, C) float32 (float64 where ``key`` is): numerator ``a``, denominator ``b``,
            exponent ``p`` before the first step. A channel with ``b == 0`` has no history, so all
            zeros is the empty state, as is None.
        cu_seqlens: (N + 1,) int32 or int64, on any device, with B = 1: sequence n is
            ``key[0, cu_seqlens[n]:cu_seqlens[n + 1]]``. Sequences may have no tokens; their state
            comes back as it was.
        backend: one of ``BACKENDS``, or "auto" (see :func:`choose_backend`). Under torch.func and forward-mode
            derivatives, which look into formulas, the reference runs in any case.

    Returns:
        output (B, T, C) in the dtype of ``key``, and the state (N, 3, C) after the last step of
        each sequence. Inputs are never modified. Differentiable, once, in all five tensors.

    Raises:
        ValueError: a shape, dtype, device, ``cu_seqlens`` or backend that does not fit; names the
            argument.
    """
    _check(time_decay, time_first, key, value, state, cu_seqlens)
    if backend == "auto":
        backend = choose_backend(key)
    else:
        _check_backend(backend, key)
    if backend == "reference" or are_transformed():
        return wkv4_reference(time_decay, time_first, key, value, state, cu_seqlens)
    if backend == "portable" and cu_seqlens is None and key.shape[1] == 1:
        return _one_token(time_decay, time_first, key, value, state)
    if state is None:  # zeros are empty, too, and made at once
        sequences = key.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        state = key.new_zeros(sequences, 3, key.shape[2], dtype=torch.promote_types(key.dtype, torch.float32))
    inputs = time_decay, time_first, key, value, state
    differentiable = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    run: Callable[..., tuple[Tensor, Tensor, Tensor]] = _OPERATORS[backend]
    if are_at_hand(*inputs):
        run = functools.partial(_Eager.apply if differentiable else _run, backend)
    output, state, _ = run(*inputs, cu_seqlens, differentiable)
    return output, state


def choose_backend(key: Tensor) -> str:
    """What ``backend="auto"`` takes: a function of the device and dtype of ``key``, and of what can be loaded.

    Where a native implementation ought to run on a device and cannot be had, one warning says why.
    """
    native = key.device.type
    if native in NATIVE and key.dtype in NATIVE[native].DTYPES and _can_load(native, key.device.index):
        return native
    return "portable"


@torch.compiler.assume_constant_result
def _can_load(backend: str, index: int | None) -> bool:
    return _tried_to_load(backend, index)


@functools.cache
def _tried_to_load(backend: str, index: int | None) -> bool:
    try:
        NATIVE[backend].load(torch.device(backend) if index is None else torch.device(backend, index))
    except loader.Unavailable as error:
        warnings.warn(f"WKV runs on its slower portable implementation: {error}", KernelWarning, stacklevel=5)
        return False
    return True


def wkv4_reference(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The operator as it is defined, step by step through autograd; called as :func:`wkv4` is."""
    if cu_seqlens is not None:
        _check_bounds(cu_seqlens, key)
        bounds = cu_seqlens.tolist()
        rows = [slice(begin, end) for begin, end in itertools.pairwise(bounds)]
        parts = [
            wkv4_reference(
                time_decay,
                time_first,
                key[:, row],
                value[:, row],
                None if state is None else state[n : n + 1],
            )
            for n, row in enumerate(rows)
        ]
        return torch.cat([y for y, _ in parts], dim=1), torch.cat([s for _, s in parts])
    if key.shape[1] == 0:
        return key.clone(), empty_state(key, key.shape[0]) if state is None else state.clone()
    dtype = torch.promote_types(key.dtype, torch.float32)
    w, u = -torch.exp(time_decay.to(dtype)), time_first.to(dtype)
    a, b, p = _unpack(key, state)
    outputs = []
    for k, v in zip(key.to(dtype).unbind(1), value.to(dtype).unbind(1), strict=True):
        y, a, b, p = _step(w, u, k, v, a, b, p)
        outputs.append(y)
    return torch.stack(outputs, dim=1).to(key.dtype), torch.stack([a, b, p], dim=1)


def empty_state(key: Tensor, sequences: int) -> Tensor:
    """The state (sequences, 3, C) before any token, in the dtype that states are kept in."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    state = torch.zeros(sequences, 3, key.shape[-1], dtype=dtype, device=key.device)
    state[:, 2] = EMPTY_EXPONENT
    return state


def _step(w: Tensor, u: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, p: Tensor) -> tuple[Tensor, ...]:
    """One stable step on (N, C): the output and the next ``a, b, p``, whose scale is a constant."""
    with torch.no_grad():
        q = torch.maximum(p, u + k)
        p_next = torch.maximum(p + w, k)
    past, now = torch.exp(p - q), torch.exp(u + k - q)
    y = torch.addcmul(past * a, now, v) / (past * b + now)  # rounded once, as in the scan
    past, now = torch.exp(p + w - p_next), torch.exp(k - p_next)
    return y, torch.addcmul(past * a, now, v), past * b + now, p_next


def _unpack(key: Tensor, state: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """``a, b, p`` of a state; wherever ``b == 0`` there is no history, whatever ``p`` says."""
    if state is None:
        state = empty_state(key, key.shape[0])
    a, b, p = state.unbind(1)
    return a, b, torch.where(b == 0, EMPTY_EXPONENT, p.detach())


def _one_token(
    time_decay: Tensor, time_first: Tensor, key: Tensor, value: Tensor, state: Tensor | None
) -> tuple[Tensor, Tensor]:
    """A step (B, 1, C) without the machinery of a scan: what generation runs, token after token."""
    dtype = torch.promote_types(key.dtype, torch.float32)
    w, u = -torch.exp(time_decay.to(dtype)), time_first.to(dtype)
    y, *after = _step(w, u, key[:, 0].to(dtype), value[:, 0].to(dtype), *_unpack(key, state))
    return y.to(key.dtype)[:, None], torch.stack(after, dim=1)


def _run(
    backend: str,
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    differentiable: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output, state and, for :func:`_run_backward`, the states at every ``TILE`` tokens."""
    if cu_seqlens is not None:
        _check_bounds(cu_seqlens, key)
    tiles = _tiles(backend, key, state, differentiable)
    if key.numel() == 0:
        return key.new_empty(key.shape), state.clone(memory_format=torch.contiguous_format), tiles
    inputs = time_decay, time_first, key, value, state
    return *_IMPLEMENTATIONS[backend].forward(*inputs, cu_seqlens, tiles), tiles


def _run_backward(
    backend: str,
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
    """Gradients of the first five arguments of :func:`wkv4`."""
    if key.numel() == 0:
        grad_state = grad_state.clone(memory_format=torch.contiguous_format)
        grad_state[:, 2] = 0
        zeros = (torch.zeros_like(x) for x in (time_decay, time_first, key, value))
        return *zeros, grad_state  # type: ignore[return-value]
    inputs = time_decay, time_first, key, value, state
    return _IMPLEMENTATIONS[backend].backward(grad_output, grad_state, *inputs, cu_seqlens, tiles)


def _tiles(backend: str, key: Tensor, state: Tensor, differentiable: bool) -> Tensor:
    """Room for a state at every ``TILE`` tokens of each sequence, (M // TILE + N, 3, C), or for none."""
    tile, (sequences, *row) = _IMPLEMENTATIONS[backend].TILE, state.shape
    return state.new_zeros(key.shape[0] * key.shape[1] // tile + sequences if differentiable and tile else 0, *row)


def _operator(backend: str) -> torch.library.CustomOpDef:
    """An implementation as an operator of PyTorch, which can be compiled and differentiated."""

    @torch.library.custom_op(f"rwkv::wkv4_{backend}", mutates_args=())
    def forward(
        time_decay: Tensor,
        time_first: Tensor,
        key: Tensor,
        value: Tensor,
        state: Tensor,
        cu_seqlens: Tensor | None,
        differentiable: bool = True,
    ) -> tuple[Tensor, Tensor, Tensor]:
        return _run(backend, time_decay, time_first, key, value, state, cu_seqlens, differentiable)

    @torch.library.custom_op(f"rwkv::wkv4_{backend}_backward", mutates_args=())
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
        inputs = time_decay, time_first, key, value, state
        return _run_backward(backend, grad_output, grad_state, *inputs, cu_seqlens, tiles)

    @forward.register_fake
    def _(time_decay, time_first, key, value, state, cu_seqlens, differentiable=True):  # type: ignore[no-untyped-def]
        return key.new_empty(key.shape), state.new_empty(state.shape), _tiles(backend, key, state, differentiable)

    @backward.register_fake
    def _(grad_output, grad_state, *inputs):  # type: ignore[no-untyped-def]
        return tuple(x.new_empty(x.shape) for x in inputs[:5])

    def save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(*inputs[:6], output[2])

    def differentiate(ctx, grad_output: Tensor, grad_state: Tensor, _: Tensor):  # type: ignore[no-untyped-def]
        return *backward(grad_output, grad_state, *ctx.saved_tensors), None, None

    forward.register_autograd(differentiate, setup_context=save)
    return forward


class _Eager(torch.autograd.Function):
    """The same without the dispatcher of PyTorch, which takes longer than a short call does."""

    @staticmethod
    def forward(backend: str, *arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _run(backend, *arguments)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
        ctx.backend, *tensors, _ = inputs
        ctx.save_for_backward(*tensors, output[2])
        ctx.mark_non_differentiable(output[2])
        ctx.set_materialize_grads(False)  # or there would be one for the tiles

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor | None, grad_state: Tensor | None, _: None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # once: checkpoints compute them when they are asked for
        grad_output = torch.zeros_like(saved[2]) if grad_output is None else grad_output.resolve_neg()
        grad_state = torch.zeros_like(saved[4]) if grad_state is None else grad_state.resolve_neg()
        return None, *_run_backward(ctx.backend, grad_output, grad_state, *saved), None, None


_OPERATORS = {backend: _operator(backend) for backend in _IMPLEMENTATIONS}


def _check(
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor | None,
    cu_seqlens: Tensor | None,
) -> None:
    """Refuse, before any work, what the operator is not defined for."""
    if key.ndim != 3:
        raise ValueError(f"key has shape {tuple(key.shape)}: expected (batch, time, channels)")
    if key.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        raise ValueError(f"key has dtype {key.dtype}: expected float16, bfloat16, float32 or float64")
    batch, _, channels = key.shape
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(
            f"value is {value.dtype} {tuple(value.shape)}: expected the same as key, {key.dtype} {tuple(key.shape)}"
        )
    for name, vector in (("time_decay", time_decay), ("time_first", time_first)):
        if vector.shape != (channels,) or not vector.is_floating_point():
            raise ValueError(
                f"{name} is {vector.dtype} {tuple(vector.shape)}: expected one float per channel, ({channels},)"
            )
    sequences = batch
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, key)
        sequences = cu_seqlens.shape[0] - 1
    if state is not None:
        dtype = torch.promote_types(key.dtype, torch.float32)
        if state.shape != (sequences, 3, channels) or state.dtype != dtype:
            raise ValueError(
                f"state is {state.dtype} {tuple(state.shape)}: expected {dtype} "
                f"{(sequences, 3, channels)}, the state that a call with as many sequences returned"
            )
    for name, tensor in (
        ("value", value),
        ("time_decay", time_decay),
        ("time_first", time_first),
        ("state", state),
    ):
        if tensor is not None and tensor.device != key.device:
            raise ValueError(f"{name} is on {tensor.device} but key is on {key.device}: move them together")


def _check_backend(backend: str, key: Tensor) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"backend is {backend!r}: choose 'auto' or one of {', '.join(sorted(BACKENDS))}")
    if backend not in NATIVE:
        return
    if key.device.type != backend:
        raise ValueError(f"backend is {backend!r} but key is on {key.device}: move the tensors, or choose 'auto'")
    if key.dtype not in NATIVE[backend].DTYPES:
        raise ValueError(f"backend is {backend!r}, which does not compute {key.dtype}: convert key, or choose 'auto'")


def _check_cu_seqlens(cu_seqlens: Tensor, key: Tensor) -> None:
    if key.shape[0] != 1:
        raise ValueError(
            f"key has batch size {key.shape[0]}: with cu_seqlens, lay the sequences end to end in batch 1"
        )
    if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 2 or cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise ValueError(
            f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: expected int32 or int64, (sequences + 1,)"
        )


def _check_bounds(cu_seqlens: Tensor, key: Tensor) -> None:
    """Look at the values, where an implementation runs: fake tensors and graphs have none."""
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != key.shape[1] or any(a > b for a, b in itertools.pairwise(bounds)):
        raise ValueError(
            f"cu_seqlens runs {bounds[:3]} ... {bounds[-1]}: expected to start at 0, "
            f"never to decrease, and to end at the number of tokens, {key.shape[1]}"
        )
