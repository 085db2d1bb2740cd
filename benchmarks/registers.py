"""What NVIDIA's assembler makes of the CUDA kernels: registers and spills. Takes no GPU.

python benchmarks/registers.py                   # for sm_80, sm_90 and sm_100
python benchmarks/registers.py sm_90
"""

import re
import sys
from collections.abc import Iterator

import torch

from rwkv_kernels import decode_cuda, loader, wkv4_cuda

ROW = "{:8}{:10}{:20}{:20}{:>10}{:>14}"
CHANNELS = 2048  # of a model whose next token is computed


def main() -> int:
    print(ROW.format("arch", "element", "built for", "kernel", "registers", "bytes spilled"))
    for arch in sys.argv[1:] or ("sm_80", "sm_90", "sm_100"):
        for dtype in wkv4_cuda.DTYPES:
            for source, built_for, macros in builds(dtype):
                for name, registers, spilled in kernels(loader.compiler_report(source, arch, macros)):
                    element = str(dtype).removeprefix("torch.")
                    print(ROW.format(arch, element, built_for, name, registers, spilled))
    return 0


def builds(dtype: torch.dtype) -> Iterator[tuple[str, str, dict[str, str]]]:
    """Sources, what they are built for, and the macros that say so."""
    for width in wkv4_cuda.widths(dtype):
        yield "wkv4_cuda.cu", f"{width} channels a thread", wkv4_cuda.defines(dtype, width)
    kinds = dtype, dtype, torch.float32
    for rows in range(1, decode_cuda.MOST_ROWS + 1):
        yield "decode_cuda.cu", f"{rows} rows", decode_cuda.defines(kinds, rows, CHANNELS)
    yield "decode_rows.cu", "any rows", decode_cuda.defines(kinds, 1, CHANNELS)


def kernels(report: str) -> list[tuple[str, int, int]]:
    """The name, registers and bytes spilled of each kernel in what the assembler said."""
    names = re.findall(r"entry function '(\w+)'", report)
    registers = map(int, re.findall(r"Used (\d+) registers", report))
    spilled = map(int, re.findall(r"(\d+) bytes spill stores", report))
    return list(zip(names, registers, spilled, strict=True))


if __name__ == "__main__":
    sys.exit(main())
