"""Runs the CUDA kernels on a CPU, so that their laws need no GPU: their own source, but for its PTX."""

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

from modeling_rwkv import decoding
from rwkv_kernels import decode_cuda, loader, wkv4, wkv4_cuda
from rwkv_kernels.decode_weights import check

HERE = Path(__file__).parent
KERNELS = (*wkv4_cuda.PLANS, "sum_pieces")
FLAGS = ("-std=c++17", "-O1", "-fPIC", "-shared", "-fno-gnu-unique")  # each library has its own memory
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
DECODING_PTX = {
    "decode_cuda.h": {"float half_to_float(unsigned short x)": "ptx_half(x)"},
    "decode_cuda.cu": {
        "void arrive(unsigned* met)": "(void)atomicAdd(met, 1)",
        "unsigned arrived(const unsigned* met)": "ptx_arrived(met)",
    },
}


def without_ptx(text: str, ptx: dict[str, str]) -> str:
    for signature, body in ptx.items():
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


def decoding_program(source: str, defines: dict[str, str]) -> str:
    """The kernels that compute a token, as C++ functions."""
    text = without_ptx((loader.KERNELS / source).read_text(), DECODING_PTX.get(source, {}))
    text = text.replace("extern __shared__ float4 memory[];", "float4* const memory = shared_memory();")
    kernels = re.findall(r"(\w+)\(const __grid_constant__ (decode::\w+) arguments\)", text)
    calls = "".join(
        f'extern "C" void run_{name}(int x, int y, int threads, const {kind}* all, int bytes, bool together) '
        f"{{ run({name}, {{x, y}}, threads, *all, bytes, together); }}\n"
        for name, kind in kernels
    )
    return f'#include "cuda_on_cpu.h"\n{_lines(defines)}{text}\n{calls}'


def _lines(defines: dict[str, str]) -> str:
    return "".join(f"#define {name} {value}\n" for name, value in defines.items())


def build(folder: Path, name: str, text: str) -> ctypes.CDLL:
    source, built = folder / f"{name}.cpp", folder / f"{name}.so"
    for header, ptx in {NUMBERS: PTX, "decode_cuda.h": DECODING_PTX["decode_cuda.h"]}.items():
        (folder / header).write_text(
            without_ptx((loader.KERNELS / header).read_text(), ptx)
        )  # found before the real one
    source.write_text(text)
    subprocess.run(["g++", *FLAGS, f"-I{HERE}", f"-I{loader.KERNELS}", source, "-o", built], check=True)
    return ctypes.CDLL(str(built))


@functools.cache
def library(folder: Path, dtype: torch.dtype, width: int) -> ctypes.CDLL:
    return build(folder, f"{dtype}-{width}", program(dtype, width))


@functools.cache
def decoding_library(folder: Path, source: str, defines: tuple[tuple[str, str], ...]) -> ctypes.CDLL:
    name = "-".join((source, *(value for _, value in defines)))
    return build(folder, name, decoding_program(source, dict(defines)))


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


@contextlib.contextmanager
def decoding_emulated(folder: Path, processors: int) -> Iterator[list[str]]:
    """Within, models on the CPU are decoded as on a GPU of so many ``processors``; gives the kernels that were run."""
    names: list[str] = []

    def kernel(name: str, device: torch.device, defines: dict[str, str], shared_bytes: int) -> Callable[..., None]:
        source = "decode_cuda.cu" if name == decode_cuda.SMALL else "decode_rows.cu"
        return getattr(decoding_library(folder, source, tuple(defines.items())), f"run_{name}")

    def launch(
        kernel: Callable[..., None],
        blocks: tuple[int, int],
        threads: int,
        arguments: ctypes.Structure,
        shared_bytes: int = 0,
        together: bool = False,
    ) -> None:
        names.append(kernel.__name__.removeprefix("run_"))
        kernel(*blocks, threads, ctypes.byref(arguments), shared_bytes, together)

    properties = SimpleNamespace(multi_processor_count=processors, shared_memory_per_block_optin=2**17)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        patch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(cuda_stream=0))
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        patch.setattr(decode_cuda, "WARPS", 2)
        patch.setattr(decode_cuda, "THREADS", 2 * decode_cuda.LANES)
        patch.setattr(decode_cuda, "check", lambda model, device: check(model, "cpu"))
        patch.setattr(decode_cuda, "_kernel", kernel)
        patch.setattr(loader, "launch", launch)
        patch.setitem(decoding.DECODERS, "cpu", decode_cuda.Decoder)
        yield names
