"""Runs the CUDA kernels of WKV-4 on a CPU, so that their laws need no GPU: their own source, but for its PTX."""

import contextlib
import ctypes
import functools
import re
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from rwkv_kernels import loader, wkv4, wkv4_cuda

HERE = Path(__file__).parent
KERNELS = (*wkv4_cuda.PLANS, "sum_pieces")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-pthread", "-fno-gnu-unique")  # each library has its own memory
NUMBERS = "cuda_numbers.h"
PTX = {  # its functions that are written in PTX, and what stands for them
    "float exp_(float x)": "ptx_exp(x)",
    "float max_(float x, float y)": "ptx_max(x, y)",
    "float min_(float x, float y)": "ptx_min(x, y)",
    "float reciprocal_(float x)": "ptx_reciprocal(x)",
    "Element narrow(float x)": "ptx_narrow(x)",
    "Packed narrow(Real x)": "narrow(x.x) | Packed(narrow(x.y)) << 16",
    "Packed larger(Packed x, Packed y)": "ptx_larger(x, y)",
    "Packed smaller(Packed x, Packed y)": "ptx_smaller(x, y)",
    "void tell(float* to, Real x)": "(void)(*reinterpret_cast<Real*>(to) = x)",
    "Real hear(const float* from)": "*reinterpret_cast<const Real*>(from)",
    "void forget(Packed& x)": "(void)x",
    "void prefetch(const Element* x)": "(void)x",
    "T* after(T* from, int i, int stride)": "ptx_after<Element>(from, i, stride)",
}


def numbers() -> str:
    """The header of PTX, without it."""
    text = (loader.KERNELS / NUMBERS).read_text()
    for signature, body in PTX.items():
        pattern = rf"(WKV_INLINE {re.escape(signature)}) \{{\n(?:(?!\n\}}).)*?asm(?: volatile)?\(.*?\n\}}"
        text, count = re.subn(pattern, rf"\1 {{ return {body}; }}", text, flags=re.DOTALL)
        assert count, f"{signature} is not in the source any more"
    return text


def program(dtype: torch.dtype, width: int) -> str:
    """The kernels as C++ functions, for elements of ``dtype`` and threads of ``width`` channels."""
    text = (loader.KERNELS / "wkv4_cuda.cu").read_text()
    defines = "".join(f"#define {name} {value}\n" for name, value in wkv4_cuda.defines(dtype, width).items())
    calls = "".join(
        f'extern "C" void run_{name}(int x, int y, int threads, const wkv4::Arguments* all) '
        f"{{ run(wkv4_{name}, {{x, y}}, threads, *all); }}\n"
        for name in KERNELS
    )
    return f'#include "cuda_on_cpu.h"\n{defines}{text}\n{calls}'


@functools.cache
def library(folder: Path, dtype: torch.dtype, width: int) -> ctypes.CDLL:
    source, built = folder / f"{dtype}-{width}.cpp", folder / f"{dtype}-{width}.so"
    (folder / NUMBERS).write_text(numbers())  # found before the one among the kernels
    source.write_text(program(dtype, width))
    subprocess.run(["g++", *FLAGS, f"-I{HERE}", f"-I{loader.KERNELS}", source, "-o", built], check=True)
    return ctypes.CDLL(str(built))


@contextlib.contextmanager
def emulated(folder: Path, processors: int) -> Iterator[None]:
    """Within, ``backend="cuda"`` takes tensors on the CPU, as on a GPU of so many ``processors``."""

    def kernel(name: str, device: torch.device, dtype: torch.dtype, width: int) -> Callable[..., None]:
        return getattr(library(folder, dtype, width), f"run_{name}")

    def launch(
        kernel: Callable[..., None], blocks: tuple[int, int], threads: int, arguments: ctypes.Structure
    ) -> None:
        kernel(*blocks, threads, ctypes.byref(arguments))

    properties = SimpleNamespace(multi_processor_count=processors)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(wkv4, "_check_backend", lambda backend, key: None)
        patch.setattr(wkv4_cuda, "_kernel", kernel)
        patch.setattr(loader, "launch", launch)
        yield
