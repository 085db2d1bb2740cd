"""One token of a whole RWKV-4 on an NVIDIA GPU, in CUDA C++: the tensors for `decode_cuda.cu`, compiled when needed.

Symbols: B rows of the batch, L blocks, C hidden size, A attention hidden size, I intermediate size, V vocabulary.
"""

import ctypes
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_kernels import loader
from rwkv_kernels.decode_weights import (
    DTYPES,
    BlockPointers,
    Matrix,
    Model,
    ModelPointers,
    Norm,
    NormPointers,
    NumbersPointers,
    Sizes,
    Stack,
    StackPointers,
    TablePointers,
    check,
    pointers,
    tensors_of,
)
from rwkv_kernels.wkv4_native import Arguments, Integer, Pointer, fields

MOST_ROWS = 4
WARPS = 16  # of the block of threads that a multiprocessor has
LANES = 32
THREADS = LANES * WARPS
SMALL = "decode_cuda"  # the kernel for few rows
PIECE = 16  # bytes that a thread reads at once


class Decoder:
    """A model whose tokens are computed from its weights where they lie: edits are seen, replacements are not.

    few: up to so many rows of a batch one kernel does it all, `decode_cuda.cu`. For more, PyTorch multiplies and
        `decode_rows.cu` does the rest.
    most_rows: that it takes; in float16 few, as the residual stream of more would have to be scaled.

    Raises:
        ValueError: a tensor that the kernels do not take; says which and why.
        loader.Unavailable: there are no kernels.
    """

    def __init__(self, model: Model) -> None:
        check(model, "cuda")
        first = model.blocks[0]
        self.model, self.tensors = model, list(tensors_of(model))
        self.dtype, self.device = model.dtype, model.head.data.device
        self._sizes = Sizes.of(model)
        if any(x.dtype == torch.int8 or x.device != self.device for x in self.tensors):
            raise ValueError("a matrix is int8, or on another device: the kernels read floats of their own device")
        self.vocab_size, self.hidden_size = model.head.data.shape
        self.attention_size, self.intermediate_size = len(first.time_decay), len(first.feed_forward_key.data)
        sizes = self.hidden_size, self.attention_size, self.intermediate_size
        if any(size * self.dtype.itemsize % PIECE for size in sizes):
            raise ValueError(f"matrices have {sizes} columns: the kernel reads {PIECE} bytes at once")
        if any(x.data_ptr() % PIECE for x in self.tensors):
            raise ValueError(f"a tensor begins at an address that is no multiple of {PIECE}")
        properties: Any = torch.cuda.get_device_properties(self.device)
        self.processors = properties.multi_processor_count
        self.few = min(MOST_ROWS, properties.shared_memory_per_block_optin // self._shared_bytes(1))
        self.most_rows = self.few if self.dtype == torch.float16 else sys.maxsize
        self._kinds = _kinds(model)
        blocks = (BlockPointers * len(model.blocks))(*(BlockPointers(*map(pointers, block)) for block in model.blocks))
        self._table = torch.frombuffer(bytearray(blocks), dtype=torch.uint8).to(self.device)
        rest = map(pointers, (model.pre_ln, model.ln_out, model.head))
        self._model = ModelPointers(len(model.blocks), self._table.data_ptr(), *rest)
        self._rooms: dict[tuple[int, int], list[Tensor]] = {}
        self._kernels: dict[tuple[str, int], loader.Kernel] = {}
        self._kernel(SMALL, 1)

    def step(self, ids: Tensor, embeddings: Tensor, before: Stack, after: Stack) -> Tensor | None:
        """Logits (B, V) of the next token; ``after`` becomes the states after this one. None for what is not taken.

        ids: (B, 1) int64, rows of ``embeddings`` (any number, C), which is of ``dtype``.
        before: as the model keeps them. ``after``: room of the same shapes; of more than ``few`` rows, it may be the
            same.
        """
        rows, ids = len(ids), ids.contiguous()
        if not 0 < rows <= self.most_rows or not self._sizes.fit(ids, embeddings, before, after):
            return None
        if embeddings.data_ptr() % PIECE:
            return None
        table = TablePointers.of(ids, embeddings)
        with torch.cuda.device(self.device):
            if rows <= self.few:
                return self._few_rows(rows, table, before, after)
            return self._many_rows(rows, table, before, after)

    def _few_rows(self, rows: int, embeddings: TablePointers, before: Stack, after: Stack) -> Tensor:
        logits = torch.empty(rows, self.vocab_size, dtype=self.dtype, device=self.device)
        room = self._room(rows)
        arguments = _Arguments(
            self._model, embeddings, StackPointers.of(before), StackPointers.of(after),
            logits.data_ptr(), *map(Tensor.data_ptr, room),
        )  # fmt: skip
        kernel, shared_bytes = self._kernel(SMALL, rows), self._shared_bytes(rows)
        loader.launch(kernel, (self.processors, 1), THREADS, arguments, shared_bytes, together=True)
        return logits

    def _many_rows(self, rows: int, embeddings: TablePointers, before: Stack, after: Stack) -> Tensor:
        kind: dict[str, Any] = {"dtype": self.dtype, "device": self.device}
        mixed = torch.empty(3, rows, self.hidden_size, **kind)
        normed, stream = torch.empty_like(mixed[0]), torch.empty_like(mixed[0], dtype=torch.float32)
        gated = torch.empty(rows, self.attention_size, **kind)
        growth: dict[str, Any] = {"embeddings": embeddings, "pre_ln": pointers(self.model.pre_ln)}
        for layer, block in enumerate(self.model.blocks):
            self._enter(
                "enter_attention", rows, block.ln1, block.attention_mix, stream=stream, out=mixed,
                before=before.time_mix[layer], after=after.time_mix[layer], **growth,
            )  # fmt: skip
            key, value, receptance = map(_product, mixed, (block.key, block.value, block.receptance))
            arguments = _Attending(
                time_decay=pointers(block.time_decay), time_first=pointers(block.time_first), key=key, value=value,
                receptance=receptance, before=before.wkv[layer], after=after.wkv[layer], out=gated,
                channels=self.attention_size,
            )  # fmt: skip
            self._launch("attend", (rows, -(-self.attention_size // THREADS)), arguments)
            self._enter(
                "enter_feed_forward", rows, block.ln2, block.feed_forward_mix, stream=stream, out=mixed,
                before=before.channel_mix[layer], after=after.channel_mix[layer], delta=_product(gated, block.output),
            )  # fmt: skip
            hidden = _product(mixed[0], block.feed_forward_key)
            squaring = _Squaring(x=hidden, count=hidden.numel())
            self._launch("square", (-(-hidden.numel() // (4 * THREADS)), 1), squaring)
            receptance = _product(mixed[1], block.feed_forward_receptance)
            growth = {"delta": _product(hidden, block.feed_forward_value), "receptance": receptance}
        self._enter("enter_head", rows, self.model.ln_out, (), stream=stream, out=normed, **growth)
        return _product(normed, self.model.head)

    def _enter(self, name: str, rows: int, norm: Norm, mixes: Sequence[Tensor], **tensors: Any) -> None:
        structures: Any = {"norm": pointers(norm), "mixes": (NumbersPointers * 3)(*map(pointers, mixes))}
        arguments = _Entering(channels=self.hidden_size, **structures, **tensors)
        self._launch(name, (rows, 1), arguments)

    def _launch(self, name: str, blocks: tuple[int, int], arguments: ctypes.Structure) -> None:
        loader.launch(self._kernel(name, 1), blocks, THREADS, arguments)

    def _room(self, rows: int) -> list[Tensor]:
        """Where blocks of threads tell each other what they found, as in decode_cuda.cu.

        For each stream its own. That of a graph is zeroed by the graph itself, which may never run or when others do.
        """
        if torch.cuda.is_current_stream_capturing():
            return self._new_room(rows)
        key = torch.cuda.current_stream(self.device).cuda_stream, rows
        if key not in self._rooms:
            self._rooms[key] = self._new_room(rows)
        return self._rooms[key]

    def _new_room(self, rows: int) -> list[Tensor]:
        sizes = self.hidden_size, self.attention_size, self.intermediate_size, self.hidden_size
        parts = [torch.empty(rows, size, device=self.device) for size in sizes]
        return [*parts, torch.zeros(2, dtype=torch.int32, device=self.device)]

    def _shared_bytes(self, rows: int) -> int:
        widest = max(3 * self.hidden_size, self.attention_size, self.intermediate_size)
        return 2 * ctypes.sizeof(BlockPointers) + 4 * rows * (2 * WARPS + widest)

    def _kernel(self, name: str, rows: int) -> loader.Kernel:
        if (name, rows) not in self._kernels:
            macros = defines(self._kinds, rows, self.hidden_size)
            shared_bytes = self._shared_bytes(rows) if name == SMALL else 0
            self._kernels[name, rows] = _kernel(name, self.device, macros, shared_bytes)
        return self._kernels[name, rows]


def _product(x: Tensor, matrix: Matrix) -> Tensor:
    return torch.nn.functional.linear(x, matrix.data)


class _Entering(Arguments):
    _fields_ = [
        *fields(NormPointers, "norm pre_ln"),
        ("mixes", NumbersPointers * 3),
        ("embeddings", TablePointers),
        *fields(Pointer, "delta receptance stream before after out"),
        *fields(Integer, "channels"),
    ]


class _Attending(Arguments):
    _fields_ = (
        fields(NumbersPointers, "time_decay time_first")
        + fields(Pointer, "key value receptance before after out")
        + fields(Integer, "channels")
    )


class _Squaring(Arguments):
    _fields_ = [("x", Pointer), ("count", Integer)]


class _Arguments(ctypes.Structure):
    _fields_ = [
        ("model", ModelPointers),
        ("embeddings", TablePointers),
        *fields(StackPointers, "before after"),
        *fields(Pointer, "logits stream gated hidden gate met"),
    ]


def defines(kinds: Sequence[torch.dtype], rows: int, hidden_size: int) -> dict[str, str]:
    """What the source is compiled with. kinds: of matrices; of norms and mixes; of time_decay and time_first."""
    matrix, vector, time = map(DTYPES.index, kinds)
    numbers = {"ELEMENT": matrix, "VECTOR": vector, "TIME": time, "CHANNELS": 1, "ROWS": rows, "WARPS": WARPS}
    numbers["FOURS"] = -(-hidden_size // (4 * THREADS))
    return {name: str(number) for name, number in numbers.items()}


def _kernel(name: str, device: torch.device, defines: dict[str, str], shared_bytes: int) -> loader.Kernel:
    kernel = loader.cuda_kernel("decode_cuda.cu" if name == SMALL else "decode_rows.cu", name, device, defines)
    loader.allow(kernel, shared_bytes)
    return kernel


def _kinds(model: Model) -> tuple[torch.dtype, torch.dtype, torch.dtype]:
    """The dtypes of matrices, of norms and mixes, of time_decay and time_first.

    Raises:
        ValueError: some of one sort are not like the others.
    """
    vectors, times = set(), set()
    for block in model.blocks:
        times |= {block.time_decay.dtype, block.time_first.dtype}
        vectors |= {x.dtype for x in (*block.attention_mix, *block.feed_forward_mix)}
        vectors |= {x.dtype for norm in (block.ln1, block.ln2) for x in (norm.weight, norm.bias)}
    vectors |= {x.dtype for norm in (model.pre_ln, model.ln_out) for x in (norm.weight, norm.bias)}
    if len(vectors) > 1 or len(times) > 1:
        raise ValueError(
            f"norms and mixes are {vectors}, time_decay and time_first {times}: the kernel reads one of each"
        )
    return model.dtype, vectors.pop(), times.pop()
