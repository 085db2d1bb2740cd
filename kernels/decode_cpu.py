"""One token of a whole RWKV-4 on a CPU, in C++: the tensors for `decode_cpu.cpp`, compiled when it is first needed.

Symbols: B rows of the batch, L blocks, C hidden size, A attention hidden size, I intermediate size, V vocabulary.
"""

import ctypes
import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rwkv_kernels import loader
from rwkv_kernels.wkv4_native import Integer, Pointer, fields

# Rows of a batch, at most, by the dtype of matrices. For more, PyTorch's products of whole batches are as fast: of
# bfloat16 sooner, for which CPUs have instructions (AMX) that nothing here uses.
MOST_ROWS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 32, torch.int8: 32}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # numbered as in decode_cpu.cpp
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


class Decoder:
    """A model whose tokens are computed from its weights where they lie: edits are seen, replacements are not.

    Raises:
        ValueError: a tensor that the kernel does not take; says which and why.
        loader.Unavailable: there is no kernel.
    """

    def __init__(self, model: Model) -> None:
        _check(model)
        self.tensors = list(tensors_of(model))
        self.dtype = model.dtype
        self.hidden_size, self.attention_size = model.head.data.shape[1], len(model.blocks[0].time_decay)
        self.vocab_size = len(model.head.data)
        self.most_rows = MOST_ROWS[model.blocks[0].key.data.dtype]
        self._blocks = (_Block * len(model.blocks))(*(_Block(*map(_argument, block)) for block in model.blocks))
        rest = map(_argument, (model.pre_ln, model.ln_out, model.head))
        self._model = _Model(len(model.blocks), ctypes.addressof(self._blocks), *rest)
        self._run = _library()

    def step(self, x: Tensor, before: Sequence[State]) -> tuple[Tensor, list[State]] | None:
        """Logits (B, V) of the next token, and the states after this one; None for what the kernel does not take.

        x: (B, C), the embeddings of the token, in ``dtype``; B is at most ``most_rows``.
        before: of each block, as the model keeps them: WKV in float32, the rest in ``dtype``. Never written to.
        """
        rows, dtype = len(x), self.dtype
        if x.dtype != dtype or x.shape != (rows, self.hidden_size) or not 0 < rows <= self.most_rows:
            return None
        shapes = [(rows, self.hidden_size)] * 2 + [(rows, 3, self.attention_size)]
        kinds = list(zip(shapes, (dtype, dtype, torch.float32), strict=True))
        if len(before) != len(self._blocks) or not all(map(_fits, _flat(before), kinds * len(before))):
            return None
        x = x.contiguous()
        after: list[Any] = [
            tuple(torch.empty(shape, dtype=dtype, device="cpu") for shape, dtype in kinds) for _ in before
        ]
        logits = torch.empty((rows, self.vocab_size), dtype=dtype, device="cpu")
        pointers = Pointer * (3 * len(before))
        states = [pointers(*map(Tensor.data_ptr, _flat(side))) for side in (before, after)]
        step = _Step(
            rows, torch.get_num_threads(), DTYPES.index(dtype), x.data_ptr(), *map(ctypes.addressof, states),
            logits.data_ptr(),
        )  # fmt: skip
        self._run(ctypes.byref(self._model), ctypes.byref(step))
        return logits, after


def load() -> None:
    """Make ready to run. Raises :class:`loader.Unavailable`, which says why that cannot be."""
    _library()


def tensors_of(value: Any) -> Iterator[Tensor]:
    """The tensors of a model, or of a part of it, in a fixed order."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Sequence):
        for part in value:
            yield from tensors_of(part)


def _flat(states: Sequence[State]) -> list[Tensor]:
    return [part for state in states for part in state]


def _fits(x: Tensor, kind: tuple[tuple[int, ...], torch.dtype]) -> bool:
    return type(x) is Tensor and (x.shape, x.dtype) == kind and x.is_cpu and x.is_contiguous()


def _check(model: Model, device: str = "cpu") -> None:
    """Raises ValueError, unless every tensor is one that the kernel for a kind of device reads."""
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
                _check_tensor(name, value.data, shape, (torch.int8,), "cpu")
                _check_tensor(f"scales of {name}", value.scales, (shape[0], 1), (torch.float32,), "cpu")


def _check_tensor(name: str, x: Tensor, shape: tuple[int, ...], dtypes: Sequence[torch.dtype], device: str) -> None:
    if type(x) not in (Tensor, nn.Parameter) or x.device.type != device or x.layout != torch.strided or x.is_neg():
        raise ValueError(f"{name} is a {type(x).__name__} on {x.device}: the kernel reads plain tensors on a {device}")
    if x.dtype not in dtypes or x.dtype not in (*DTYPES, torch.int8):
        raise ValueError(f"{name} is {x.dtype}: the kernel reads {', '.join(map(str, DTYPES))}, all matrices alike")
    if x.shape != shape or not x.is_contiguous():
        raise ValueError(f"{name} has shape {tuple(x.shape)} and strides {x.stride()}: expected {shape} without gaps")


# The structures of decode_cpu.cpp.


class _Numbers(ctypes.Structure):
    _fields_ = [("data", Pointer), ("dtype", Integer)]


class _Matrix(ctypes.Structure):
    _fields_ = fields(Pointer, "data scales") + fields(Integer, "dtype rows columns")


class _Norm(ctypes.Structure):
    _fields_ = [*fields(_Numbers, "weight bias"), ("epsilon", ctypes.c_double)]


class _Block(ctypes.Structure):
    _fields_ = (
        fields(_Norm, "ln1 ln2")
        + fields(_Numbers, "time_decay time_first")
        + [("attention_mix", _Numbers * 3), ("feed_forward_mix", _Numbers * 2)]
        + fields(_Matrix, "key value receptance output")
        + fields(_Matrix, "feed_forward_key feed_forward_receptance feed_forward_value")
    )


class _Model(ctypes.Structure):
    _fields_ = [("layers", Integer), ("blocks", Pointer), *fields(_Norm, "pre_ln ln_out"), ("head", _Matrix)]


class _Step(ctypes.Structure):
    _fields_ = fields(Integer, "rows threads dtype") + fields(Pointer, "x before after logits")


def _argument(part: Any) -> Any:
    if isinstance(part, Matrix):
        scales = None if part.scales is None else part.scales.data_ptr()
        dtype = INT8 if part.scales is not None else DTYPES.index(part.data.dtype)
        return _Matrix(part.data.data_ptr(), scales, dtype, *part.data.shape)
    if isinstance(part, Norm):
        return _Norm(_argument(part.weight), _argument(part.bias), part.epsilon)
    if isinstance(part, Tensor):
        return _Numbers(part.data_ptr(), DTYPES.index(part.dtype))
    return (_Numbers * len(part))(*map(_argument, part))


@functools.cache
def _library() -> Any:
    run = loader.cpu_library("decode_cpu.cpp").decode_cpu
    run.argtypes, run.restype = (ctypes.c_void_p, ctypes.c_void_p), None
    return run
