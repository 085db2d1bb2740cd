"""How native code is handed tensors, and when it may be."""

import ctypes

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


class Sequences(ctypes.Structure):
    """``Sequences`` of wkv4_cpu.cpp and cuda_tiles.h: a tensor (B, T, C) with its channels side by side."""

    _fields_ = [("data", ctypes.c_void_p), ("batch_stride", ctypes.c_int64), ("time_stride", ctypes.c_int64)]


Integer, Pointer = ctypes.c_int64, ctypes.c_void_p


class Arguments(ctypes.Structure):
    """``Arguments`` of wkv4_cpu.cpp and cuda_tiles.h: numbers and pointers, filled in with numbers and tensors.

    It keeps the tensors that it points to. What is left out, None or empty is a null pointer.
    """

    def __init__(self, **values: Tensor | int | None) -> None:
        super().__init__()
        self.values = values
        for name, value in values.items():
            if isinstance(value, Tensor):
                self._point(name, value)
            else:
                setattr(self, name, value)

    def _point(self, name: str, x: Tensor) -> None:
        if isinstance(getattr(self, name), Sequences):
            setattr(self, name, Sequences(x.data_ptr(), x.stride(0), x.stride(1)))
        else:
            setattr(self, name, x.data_ptr() if x.numel() else None)


def fields(kind: type, names: str) -> list[tuple[str, type]]:
    """Fields of one kind, for a structure."""
    return [(name, kind) for name in names.split()]


def rows(x: Tensor) -> Tensor:
    """``x`` (B, T, C), copied if its channels do not lie side by side, or its tokens absurdly far apart."""
    return x if x.stride(2) == 1 and x.stride(1) < 2**28 else x.contiguous()


def are_at_hand(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors with numbers in memory, and nobody watches what is done with them.

    False in what is traced, compiled or transformed (torch.compile, make_fx, torch.func, forward-mode gradients), for
    fakes and subclasses, and for a view that negates what is in memory: those need operations of PyTorch.
    """
    watched = torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._len_torch_dispatch_stack() > 0
    return not watched and not are_transformed() and all(x is None or _is_plain(x) for x in tensors)


def are_transformed() -> bool:
    """Whether torch.func, or a forward-mode derivative, is at work: both need formulas that they can look into."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def _is_plain(x: Tensor) -> bool:
    return type(x) in (Tensor, nn.Parameter) and x.layout == torch.strided and not x.is_meta and not x.is_neg()
