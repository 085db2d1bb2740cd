"""WKV-4 on an NVIDIA GPU, in CUDA C++: the tensors for `wkv4_cuda.cu`, which is compiled when it is first needed.

Symbols: B batch, T time steps, C channels, N sequences, M tokens of all sequences.
"""

import torch
from torch import Tensor

from rwkv_kernels import loader
from rwkv_kernels.wkv4_native import Arguments, Integer, Pointer, Sequences, fields, rows

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # numbered as in wkv4_cuda.cu
LANES = 32  # threads of a warp, side by side along channels

# The fastest of some forty choices on an H200. A tile of a block of threads is WARPS * STEPS tokens; BLOCKS of them
# share a multiprocessor.
FORWARD = {"WARPS": 4, "STEPS": 12, "BLOCKS": 4}
BACKWARD = {"WARPS": 4, "STEPS": 6, "BLOCKS": 3}
TILE = BACKWARD["WARPS"] * BACKWARD["STEPS"]  # tokens between two states that the forward pass keeps
PIECE = FORWARD["WARPS"] * FORWARD["STEPS"]  # tokens that a piece is a multiple of, and a multiple of TILE


class _Arguments(Arguments):
    _fields_ = (
        fields(Integer, "time channels pieces length")
        + fields(Pointer, "bounds time_decay time_first")
        + fields(Sequences, "key value")
        + fields(Pointer, "state tiles sums output final_state")
        + fields(Sequences, "grad_output")
        + fields(Pointer, "grad_state grad_key grad_value grad_initial grad_vectors")
    )


def load(device: torch.device) -> None:
    """Make ready to run. Raises :class:`loader.Unavailable`, which says why that cannot be."""
    _kernel("forward", device, torch.bfloat16, 2)


def _kernel(name: str, device: torch.device, dtype: torch.dtype, width: int) -> loader.Kernel:
    return loader.cuda_kernel("wkv4_cuda.cu", f"wkv4_{name}", device, defines(dtype, width))


def defines(dtype: torch.dtype, width: int) -> dict[str, str]:
    """What the source is compiled with, for elements of ``dtype`` and threads of ``width`` channels, 1 or 2."""
    shape = {f"FORWARD_{name}": n for name, n in FORWARD.items()} | {
        f"BACKWARD_{name}": n for name, n in BACKWARD.items()
    }
    numbers = {"ELEMENT": DTYPES.index(dtype), "CHANNELS": width, "TILE": TILE} | shape
    return {name: str(number) for name, number in numbers.items()}


def pieces(tokens: int, longest: int, blocks: int, processors: int) -> tuple[int, int]:
    """Into how many pieces, of how many tokens, sequences are cut so that they fill a GPU.

    Cutting costs reading keys and values once more. So sequences stay whole where they give three of four
    multiprocessors a block of threads; otherwise there are pieces for three blocks on each, as far as tokens go. On an
    H200 that was within a tenth of the best of nine numbers of pieces, for each of seven shapes.

    Args:
        tokens: of all sequences.
        longest: tokens of the longest one, at least 1.
        blocks: of threads, that the channels of one sequence take.
        processors: multiprocessors of the GPU.
    """
    blocks *= max(1, tokens // longest)
    whole = -(-longest // PIECE)
    wanted = 1 if 4 * blocks >= 3 * processors else min(whole, -(-3 * processors // blocks))
    length = -(-whole // wanted) * PIECE
    return -(-longest // length), length


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
    output, final_state = key.new_empty(key.shape), state.new_empty(state.shape)
    _launch(
        ("sums", "forward"), time_decay, time_first, key, value, state, cu_seqlens, tiles,
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
    vectors = _launch(
        ("adjoints", "backward"), time_decay, time_first, key, value, state, cu_seqlens, tiles,
        grad_output=rows(grad_output), grad_state=grad_state.contiguous(),
        grad_key=grad_key, grad_value=grad_value, grad_initial=initial,
    )  # fmt: skip
    first, decay = (vectors[:, i].sum(0) for i in range(2))  # a sum of PyTorch's has one order
    return decay.to(time_decay.dtype), first.to(time_first.dtype), grad_key, grad_value, initial


def _launch(
    kernels: tuple[str, str],
    time_decay: Tensor,
    time_first: Tensor,
    key: Tensor,
    value: Tensor,
    state: Tensor,
    cu_seqlens: Tensor | None,
    tiles: Tensor,
    **more: Tensor,
) -> Tensor:
    """Run the second kernel, after the first where sequences are cut.

    Returns the gradients of u and w of every piece, (pieces of all, 2, C), which only a backward pass fills in.
    """
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
    width = 2 if channels % 2 == 0 and all(_is_paired(x) for x in tensors.values() if x is not None) else 1
    blocks = -(-channels // (LANES * width))
    longest = time if cu_seqlens is None else int(cu_seqlens.diff().max())
    processors = torch.cuda.get_device_properties(key.device).multi_processor_count
    count, length = pieces(batch * time, longest, blocks, processors)
    vectors = state.new_empty(sequences * count, 2, channels)
    sums = state.new_empty(sequences * count, 3, channels) if count > 1 else None
    arguments = _Arguments(
        time=time, channels=channels, pieces=count, length=length, sums=sums, grad_vectors=vectors, **tensors
    )
    with torch.cuda.device(key.device):
        for name in kernels if count > 1 else kernels[1:]:
            threads = LANES * (FORWARD if name in ("sums", "forward") else BACKWARD)["WARPS"]
            kernel = _kernel(name, key.device, key.dtype, width)
            loader.launch(kernel, sequences * count * blocks, threads, arguments)
    return vectors


def _is_paired(x: Tensor) -> bool:
    """Whether two neighbouring channels, the first of even number, can be read at once."""
    return x.data_ptr() % (2 * x.element_size()) == 0 and all(stride % 2 == 0 for stride in x.stride()[:-1])
