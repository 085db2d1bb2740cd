"""The weights of an RWKV-4 whose next token is computed at once: tensors, and the structures that kernels are handed.

Symbols: B rows of the batch, L blocks, C hidden size, A attention hidden size, I intermediate size, V vocabulary.
"""

import ctypes
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_kernels.wkv4_native import Integer, Pointer, fields

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # numbered as in the kernels
INT8 = len(DTYPES)


class Matrix(NamedTuple):
    """data: (rows, columns) of one of ``DTYPES``; or int8, by ``scales`` (rows, 1) float32 to be multiplied."""

    data: Tensor
    scales: Tensor | None = None


class Norm(NamedTuple):
    """A layer norm. weight, bias: (C,)."""

    weight: Tensor
    bias: Tensor
    epsilon: float


class Block(NamedTuple):
    """A block. Vectors may be of any of ``DTYPES``."""

    ln1: Norm
    ln2: Norm
    time_decay: Tensor  # (A,)
    time_first: Tensor  # (A,)
    attention_mix: Sequence[Tensor]  # C elements each, of key, value and receptance
    feed_forward_mix: Sequence[Tensor]  # C elements each, of key and receptance
    key: Matrix  # (A, C)
    value: Matrix  # (A, C)
    receptance: Matrix  # (A, C)
    output: Matrix  # (C, A)
    feed_forward_key: Matrix  # (I, C)
    feed_forward_receptance: Matrix  # (C, C)
    feed_forward_value: Matrix  # (C, I)


class Model(NamedTuple):
    """Everything but the embeddings. dtype: of embeddings, logits and all but int8 matrices, one of ``DTYPES``."""

    dtype: torch.dtype
    blocks: Sequence[Block]
    pre_ln: Norm
    ln_out: Norm
    head: Matrix  # (V, C)


State = tuple[Tensor, Tensor, Tensor]  # of a block: (B, C), (B, C), (B, 3, A), the parts of a LayerState


class Stack(NamedTuple):
    """The states of all blocks.

    time_mix, channel_mix: (L, B, C); wkv: (L, B, 3, A). Kernels read those in the dtype of the model, and float32.
    """

    time_mix: Tensor
    channel_mix: Tensor
    wkv: Tensor

    @classmethod
    def of(cls, states: Sequence[State]) -> "Stack":
        return cls(*map(torch.stack, zip(*states, strict=True)))

    def empty_like(self) -> "Stack":
        return Stack(*map(torch.empty_like, self))


class Sizes(NamedTuple):
    """What the kernels for a model are given beside its weights, and where it is."""

    dtype: torch.dtype
    device: torch.device
    blocks: int
    hidden_size: int
    attention_size: int

    @classmethod
    def of(cls, model: Model) -> "Sizes":
        head = model.head.data
        return cls(model.dtype, head.device, len(model.blocks), head.shape[1], len(model.blocks[0].time_decay))

    def fit(self, ids: Tensor, embeddings: Tensor, *stacks: Stack) -> bool:
        """Whether these are ids (B, 1) int64, a table (any number, C) of ``dtype``, and states of so many rows."""
        rows, dtypes = len(ids), (torch.int64, self.dtype)
        shapes = (self.blocks, rows, self.hidden_size), (self.blocks, rows, 3, self.attention_size)
        return (
            (ids.dtype, embeddings.dtype) == dtypes
            and ids.shape == (rows, 1)
            and embeddings.shape[1:] == (self.hidden_size,)
            and all(x.time_mix.shape == x.channel_mix.shape == shapes[0] and x.wkv.shape == shapes[1] for x in stacks)
            and all(x.time_mix.dtype == x.channel_mix.dtype == self.dtype for x in stacks)
            and all(x.wkv.dtype == torch.float32 for x in stacks)
            and all(map(self._has_gapless, (embeddings, *(x for stack in stacks for x in stack))))
            and ids.device == self.device
        )

    def _has_gapless(self, x: Tensor) -> bool:
        return type(x) in (Tensor, nn.Parameter) and x.device == self.device and x.is_contiguous()


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of a model, or of a part of it, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Sequence):
        for part in value:
            yield from tensors_of(part)


def check(model: Model, device: str) -> None:
    """Raises ValueError, unless every tensor is one that the kernels for a type of device read."""
    (vocabulary, hidden), dtype = model.head.data.shape, model.dtype
    attention, intermediate = len(model.blocks[0].time_decay), len(model.blocks[0].feed_forward_key.data)
    shapes = {
        "time_decay": (attention,), "time_first": (attention,), "output": (hidden, attention),
        "key": (attention, hidden), "value": (attention, hidden), "receptance": (attention, hidden),
        "feed_forward_key": (intermediate, hidden), "feed_forward_value": (hidden, intermediate),
        "feed_forward_receptance": (hidden, hidden), "head": (vocabulary, hidden),
    }  # fmt: skip
    parts: list[Any] = [*model.blocks, model._replace(blocks=())]
    for part in parts:
        for name, value in part._asdict().items():
            shape = shapes.get(name, (hidden,))
            if not isinstance(value, Matrix):
                for x in tensors_of(value):
                    _check_tensor(name, x.view(-1) if x.shape[:-1].numel() == 1 else x, shape, DTYPES, device)
            elif value.scales is None:
                _check_tensor(name, value.data, shape, (dtype,), device)
            else:
                _check_tensor(name, value.data, shape, (torch.int8,), device)
                _check_tensor(f"scales of {name}", value.scales, (shape[0], 1), (torch.float32,), device)


def _check_tensor(name: str, x: Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], device: str) -> None:
    if type(x) not in (Tensor, nn.Parameter) or x.device.type != device or x.layout != torch.strided or x.is_neg():
        raise ValueError(f"{name} is a {type(x).__name__} on {x.device}: the kernel reads plain tensors on a {device}")
    if x.dtype not in dtypes or x.dtype not in (*DTYPES, torch.int8):
        raise ValueError(f"{name} is {x.dtype}: the kernel reads {', '.join(map(str, DTYPES))}, all matrices alike")
    if x.shape != shape or not x.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(x.shape)} and strides {x.stride()}: expected {shape} without gaps")


# As decode_cpu.cpp and decode_cuda.h have them.


class NumbersPointers(ctypes.Structure):
    _fields_ = [("data", Pointer), ("dtype", Integer)]


class MatrixPointers(ctypes.Structure):
    _fields_ = fields(Pointer, "data scales") + fields(Integer, "dtype rows columns")


class NormPointers(ctypes.Structure):
    _fields_ = [*fields(NumbersPointers, "weight bias"), ("epsilon", ctypes.c_double)]


class BlockPointers(ctypes.Structure):
    _fields_ = (
        fields(NormPointers, "ln1 ln2")
        + fields(NumbersPointers, "time_decay time_first")
        + [("attention_mix", NumbersPointers * 3), ("feed_forward_mix", NumbersPointers * 2)]
        + fields(MatrixPointers, "key value receptance output")
        + fields(MatrixPointers, "feed_forward_key feed_forward_receptance feed_forward_value")
    )


class ModelPointers(ctypes.Structure):
    _fields_ = [
        ("layers", Integer),
        ("blocks", Pointer),
        *fields(NormPointers, "pre_ln ln_out"),
        ("head", MatrixPointers),
    ]


class TablePointers(ctypes.Structure):
    """ids: (B); data: (rows, C), some of whose rows they are."""

    _fields_ = fields(Pointer, "ids data") + fields(Integer, "rows")

    @classmethod
    def of(cls, ids: Tensor, embeddings: Tensor) -> "TablePointers":
        return cls(ids.data_ptr(), embeddings.data_ptr(), len(embeddings))


class StackPointers(ctypes.Structure):
    _fields_ = fields(Pointer, "time_mix channel_mix wkv")

    @classmethod
    def of(cls, stack: Stack) -> "StackPointers":
        return cls(*map(Tensor.data_ptr, stack))


def pointers(part: Any) -> Any:
    """The structure of a Matrix, Norm, vector, or of several vectors."""
    if isinstance(part, Matrix):
        scales = None if part.scales is None else part.scales.data_ptr()
        dtype = INT8 if part.scales is not None else DTYPES.index(part.data.dtype)
        return MatrixPointers(part.data.data_ptr(), scales, dtype, *part.data.shape)
    if isinstance(part, Norm):
        return NormPointers(pointers(part.weight), pointers(part.bias), part.epsilon)
    if isinstance(part, Tensor):
        return NumbersPointers(part.data_ptr(), DTYPES.index(part.dtype))
    return (NumbersPointers * len(part))(*map(pointers, part))
