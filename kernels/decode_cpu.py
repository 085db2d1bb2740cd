"""One token of a whole RWKV-4 on a CPU, in C++: the tensors for `decode_cpu.cpp`, compiled when it is first needed.

Symbols: B rows of the batch, L blocks, C hidden size, A attention hidden size, I intermediate size, V vocabulary.
"""

import ctypes
import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rwkv_kernels import loader
from rwkv_kernels.decode_weights import DTYPES, BlockPointers, Model, ModelPointers, State, check, pointers
from rwkv_kernels.wkv4_native import Integer, Pointer, fields

# Rows of a batch, at most, by the dtype of matrices. For more, PyTorch's products of whole batches are as fast.
MOST_ROWS = {torch.float32: 32, torch.bfloat16: 16, torch.float16: 32, torch.int8: 32}
MOST_ROWS_BY_AMX = MOST_ROWS | {torch.bfloat16: 64, torch.int8: 128}


class Decoder:
    """A model whose tokens are computed from its weights where they lie: edits are seen, replacements are not.

    Raises:
        ValueError: a tensor that the kernel does not take; says which and why.
        loader.Unavailable: there is no kernel.
    """

    def __init__(self, model: Model) -> None:
        check(model, "cpu")
        self.model = model  # which keeps what is pointed to
        self.dtype = model.dtype
        self.hidden_size, self.attention_size = model.head.data.shape[1], len(model.blocks[0].time_decay)
        self.vocab_size = len(model.head.data)
        self.amx = has_amx()
        self.most_rows = (MOST_ROWS_BY_AMX if self.amx else MOST_ROWS)[model.blocks[0].key.data.dtype]
        self._blocks = (BlockPointers * len(model.blocks))(
            *(BlockPointers(*map(pointers, block)) for block in model.blocks)
        )
        rest = map(pointers, (model.pre_ln, model.ln_out, model.head))
        self._model = ModelPointers(len(model.blocks), ctypes.addressof(self._blocks), *rest)
        self._run = _library().decode_cpu

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
        several = Pointer * (3 * len(before))
        states = [several(*map(Tensor.data_ptr, _flat(side))) for side in (before, after)]
        step = _Step(
            rows, torch.get_num_threads(), DTYPES.index(dtype), self.amx, x.data_ptr(),
            *map(ctypes.addressof, states), logits.data_ptr(),
        )  # fmt: skip
        self._run(ctypes.byref(self._model), ctypes.byref(step))
        return logits, after


def load() -> None:
    """Make ready to run. Raises :class:`loader.Unavailable`, which says why that cannot be."""
    _library()


def _flat(states: Sequence[State]) -> list[Tensor]:
    return [part for state in states for part in state]


def _fits(x: Tensor, kind: tuple[tuple[int, ...], torch.dtype]) -> bool:
    return type(x) is Tensor and (x.shape, x.dtype) == kind and x.is_cpu and x.is_contiguous()


class _Step(ctypes.Structure):
    _fields_ = fields(Integer, "rows threads dtype amx") + fields(Pointer, "x before after logits")


@functools.cache
def has_amx() -> bool:
    """Whether the CPU has a matrix unit, which then multiplies bfloat16 and int8, of any number of rows."""
    return bool(_library().decode_cpu_has_amx())


@functools.cache
def _library() -> ctypes.CDLL:
    library = loader.cpu_library("decode_cpu.cpp")
    library.decode_cpu.argtypes, library.decode_cpu.restype = (ctypes.c_void_p, ctypes.c_void_p), None
    return library
