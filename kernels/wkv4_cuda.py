"""WKV-4 on an NVIDIA GPU, in CUDA C++: the tensors for `wkv4_cuda.cu`, which is compiled when it is first needed.

Symbols: B batch, T time steps, C channels, N sequences, M tokens of all sequences.
"""

import ctypes

import torch
from torch import Tensor

from rwkv_kernels import loader
from rwkv_kernels.wkv4_native import Arguments, Pointer, Sequences, fields, rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # numbered as in cuda_numbers.h
LANES = 32  # threads of a warp, side by side along channels
NOTHING = -1  # as an integer, where nobody has told anything yet

# How a pass goes through a sequence, whole or cut (`Plan` in cuda_tiles.h): the fastest of some sixty choices on an
# H200. A tile of a block of threads is WARPS * STEPS tokens; BLOCKS of them share a multiprocessor.
PLANS = {
    "forward": {"WARPS": 4, "STEPS": 16, "BLOCKS": 3},
    "backward": {"WARPS": 4, "STEPS": 8, "BLOCKS": 3},
    "forward_cut": {"WARPS": 4, "STEPS": 16, "BLOCKS": 4},
    "backward_cut": {"WARPS": 4, "STEPS": 8, "BLOCKS": 3},
}
SUM_WARPS = 8  # of a block that sums up the gradients of pieces
TILE = 32  # tokens between two states that the forward pass keeps: a tile of the backward pass
MOST_PIECES = 2**16 - 1  # that a grid of blocks can have
MOST_TOKENS = 2**31 - 2**8  # an integer counts these, and those of two tiles after them


class _Arguments(Arguments):
    _fields_ = (
        fields(ctypes.c_int32, "time channels sequences groups pieces ahead")
        + fields(Pointer, "bounds time_decay time_first")
        + fields(Sequences, "key value")
        + fields(Pointer, "state tiles told output final_state")
        + fields(Sequences, "grad_output")
        + fields(Pointer, "grad_state grad_key grad_value grad_initial grad_pieces grad_first grad_decay")
    )


def load(device: torch.device) -> None:
    """Make ready to run. Raises :class:`loader.Unavailable`, which says why that cannot be."""
    _kernel("forward", device, torch.bfloat16, 2)


def _kernel(name: str, device: torch.device, dtype: torch.dtype, width: int) -> loader.Kernel:
    return loader.cuda_kernel("wkv4_cuda.cu", f"wkv4_{name}", device, defines(dtype, width))


def defines(dtype: torch.dtype, width: int) -> dict[str, str]:
    """What the source is compiled with, for elements of ``dtype`` and threads of ``width`` channels."""
    plans = {f"{plan.upper()}_{name}": n for plan, shape in PLANS.items() for name, n in shape.items()}
    numbers = {"ELEMENT": DTYPES.index(dtype), "CHANNELS": width, "TILE": TILE, "SUM_WARPS": SUM_WARPS} | plans
    return {name: str(number) for name, number in numbers.items()}


def widths(dtype: torch.dtype) -> tuple[int, ...]:
    """How many channels a thread can have: one, or as many as make four bytes."""
    return (1, 2) if dtype.itemsize == 2 else (1,)


def is_cut(tokens: int, longest: int, blocks: int, processors: int) -> bool:
    """Whether each tile of a sequence is a block of threads of its own, which waits for those before it.

    So it is where whole sequences would give a multiprocessor less than one and a half blocks: on an H200 a pass over
    whole sequences then moves fewer bytes a second.

    Args:
        tokens: of all sequences.
        longest: tokens of the longest one, at least 1.
        blocks: of threads, that the channels of one sequence take.
        processors: multiprocessors of the GPU.
    """
    whole = blocks * max(1, tokens // longest)
    return 2 * whole < 3 * processors and TILE < longest <= TILE * MOST_PIECES


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

    tiles: (M // TILE + N, 3, C) float32, to be filled with what ``backward`` needs; or empty.
    """
    tokens = key.shape[0] * key.shape[1]
    if tokens > MOST_TOKENS:
        raise ValueError(f"key has {tokens} tokens: pass at most {MOST_TOKENS} at a time")
    output, final_state = key.new_empty(key.shape), state.new_empty(state.shape)
    _launch(
        "forward", time_decay, time_first, key, value, state, cu_seqlens, tiles,
        output=output, final_state=final_state,
    )  # fmt: skip
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
    first, decay = state.new_empty(key.shape[2]), state.new_empty(key.shape[2])
    _launch(
        "backward", time_decay, time_first, key, value, state, cu_seqlens, tiles,
        grad_output=rows(grad_output), grad_state=grad_state.contiguous(),
        grad_key=grad_key, grad_value=grad_value, grad_initial=initial,
        grad_first=first, grad_decay=decay,
    )  # fmt: skip
    return decay.to(time_decay.dtype), first.to(time_first.dtype), grad_key, grad_value, initial


def _launch(
    name: str,
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    tiles: Tensor,
    **more: Tensor,
) -> None:
    """Run a pass, "forward" or "backward"."""
    (batch, time, channels), sequences = key.shape, len(state)
    tensors = {
        "bounds": None if cu_seqlens is None else cu_seqlens.to(key.device, torch.int64).contiguous(),
        "time_decay": time_decay.float().contiguous(),
        "time_first": time_first.float().contiguous(),
        "key": rows(key),
        "value": rows(value),
        "state": state.contiguous(),
        "tiles": tiles,
    } | more
    paired = channels % 2 == 0 and all(_is_paired(x) for x in tensors.values() if x is not None)
    width = widths(key.dtype)[-1] if paired else 1
    blocks = -(-channels // (LANES * width))
    longest = time if cu_seqlens is None else int(cu_seqlens.diff().max())
    processors = torch.cuda.get_device_properties(key.device).multi_processor_count
    count, ahead, told = 1, 0, None
    wasteful = sequences * longest > 4 * batch * time  # a short sequence has the blocks, and the room, of the longest
    if not wasteful and is_cut(batch * time, longest, blocks, processors):
        name = f"{name}_cut"
        count = -(-longest // (PLANS[name]["WARPS"] * PLANS[name]["STEPS"]))
        ahead = -(-processors * PLANS[name]["BLOCKS"] // (2 * sequences * blocks))  # half of those that run at once
        told = torch.full((sequences * blocks, count, 3, LANES * width), NOTHING, dtype=torch.int32, device=key.device)
    is_backward = "grad_key" in more
    pieces = state.new_empty(sequences * count, 2, channels) if is_backward else None
    arguments = _Arguments(
        time=time, channels=channels, sequences=sequences, groups=blocks, pieces=count, ahead=ahead, told=told,
        grad_pieces=pieces, **tensors,
    )  # fmt: skip
    with torch.cuda.device(key.device):
        kernel = _kernel(name, key.device, key.dtype, width)
        loader.launch(kernel, (sequences * blocks, count), LANES * PLANS[name]["WARPS"], arguments)
        if is_backward:
            kernel = _kernel("sum_pieces", key.device, key.dtype, width)
            loader.launch(kernel, (-(-2 * channels // LANES), 1), LANES * SUM_WARPS, arguments)


def _is_paired(x: Tensor) -> bool:
    """Whether two neighbouring channels, the first of even number, can be read at once."""
    return x.data_ptr() % (2 * x.element_size()) == 0 and all(stride % 2 == 0 for stride in x.stride()[:-1])
