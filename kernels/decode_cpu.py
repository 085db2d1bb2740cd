"""One token of a whole RWKV-4 on a CPU, in C++: the tensors for `decode_cpu.cpp`, compiled when it is first needed.

Symbols: B rows of the batch, C hidden size, V vocabulary.
"""

import ctypes
import functools

import torch
from torch import Tensor

from rwkv_kernels import loader
from rwkv_kernels.decode_weights import (
    DTYPES,
    BlockPointers,
    Model,
    ModelPointers,
    Sizes,
    Stack,
    StackPointers,
    TablePointers,
    check,
    pointers,
)
from rwkv_kernels.wkv4_native import Integer, Pointer, fields

# What multiplies bfloat16 and int8, numbered as in decode_cpu.cpp: the vectors of any CPU; for bfloat16, instructions
# that add up products of pairs (AVX-512 BF16); or a matrix unit.
UNITS = ("vectors", "pairs", "amx")

# Rows of a batch, at most, by unit and by the dtype of matrices. For more, PyTorch's products of whole batches were as
# fast or faster, on CPUs of Intel and, of pairs, of AMD; there more than 128 rows were not tried.
MOST_ROWS = {
    "vectors": {torch.float32: 32, torch.bfloat16: 16, torch.float16: 32, torch.int8: 32},
    "pairs": {torch.float32: 128, torch.bfloat16: 128, torch.float16: 128, torch.int8: 64},
    "amx": {torch.float32: 32, torch.bfloat16: 64, torch.float16: 32, torch.int8: 128},
}


class Decoder:
    """A model whose tokens are computed from its weights where they lie: edits are seen, replacements are not.

    most_rows: of a batch, that it takes.

    Raises:
        ValueError: a tensor that the kernel does not take; says which and why.
        loader.Unavailable: there is no kernel.
    """

    def __init__(self, model: Model) -> None:
        check(model, "cpu")
        self.model = model  # which keeps what is pointed to
        self._sizes = Sizes.of(model)
        unit = best_unit()
        self._unit = UNITS.index(unit)
        self.most_rows = MOST_ROWS[unit][model.blocks[0].key.data.dtype]
        blocks = (BlockPointers * len(model.blocks))(*(BlockPointers(*map(pointers, block)) for block in model.blocks))
        self._blocks = blocks  # which the next one points to
        rest = map(pointers, (model.pre_ln, model.ln_out, model.head))
        self._model = ModelPointers(len(blocks), ctypes.addressof(blocks), *rest)
        self._run = _library().decode_cpu

    def step(self, ids: Tensor, embeddings: Tensor, before: Stack, after: Stack) -> Tensor | None:
        """Logits (B, V) of the next token; ``after`` becomes the states after this one. None for what is not taken.

        ids: (B, 1) int64, rows of ``embeddings`` (any number, C), which is of the dtype of the model.
        before: as the model keeps them. ``after``: other room of the same shapes.
        """
        rows, dtype, ids = len(ids), self.model.dtype, ids.contiguous()
        if not 0 < rows <= self.most_rows or not self._sizes.fit(ids, embeddings, before, after):
            return None
        logits = torch.empty((rows, len(self.model.head.data)), dtype=dtype, device="cpu")
        step = _Step(
            rows, torch.get_num_threads(), DTYPES.index(dtype), self._unit, TablePointers.of(ids, embeddings),
            StackPointers.of(before), StackPointers.of(after), logits.data_ptr(),
        )  # fmt: skip
        is_done = self._run(ctypes.byref(self._model), ctypes.byref(step))
        return logits if is_done else None


def load() -> None:
    """Make ready to run. Raises :class:`loader.Unavailable`, which says why that cannot be."""
    _library()


class _Step(ctypes.Structure):
    _fields_ = [
        *fields(Integer, "rows threads dtype unit"),
        ("embeddings", TablePointers),
        *fields(StackPointers, "before after"),
        *fields(Pointer, "logits"),
    ]


@functools.cache
def best_unit() -> str:
    """Which of ``UNITS`` the CPU has and the kernel was compiled for, the last of them.

    Raises:
        loader.Unavailable: there is no kernel.
    """
    return UNITS[_library().decode_cpu_unit()]


@functools.cache
def _library() -> ctypes.CDLL:
    library = loader.cpu_library("decode_cpu.cpp")
    library.decode_cpu.argtypes, library.decode_cpu.restype = (ctypes.c_void_p, ctypes.c_void_p), ctypes.c_int
    return library
