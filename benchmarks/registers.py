"""What NVIDIA's assembler makes of the CUDA kernels: registers and spills. Takes no GPU.

python benchmarks/registers.py                   # for sm_80, sm_90 and sm_100
python benchmarks/registers.py sm_90
"""

import re
import sys

from rwkv_kernels import loader, wkv4_cuda

ROW = "{:8}{:10}{:>10}  {:16}{:>10}{:>14}"


def main() -> int:
    print(ROW.format("arch", "element", "channels", "kernel", "registers", "bytes spilled"))
    for arch in sys.argv[1:] or ("sm_80", "sm_90", "sm_100"):
        for dtype in wkv4_cuda.DTYPES:
            for width in wkv4_cuda.widths(dtype):
                report = loader.compiler_report("wkv4_cuda.cu", arch, wkv4_cuda.defines(dtype, width))
                for name, registers, spilled in kernels(report):
                    print(ROW.format(arch, str(dtype).removeprefix("torch."), width, name, registers, spilled))
    return 0


def kernels(report: str) -> list[tuple[str, int, int]]:
    """The name, registers and bytes spilled of each kernel in what the assembler said."""
    names = re.findall(r"entry function '(\w+)'", report)
    registers = map(int, re.findall(r"Used (\d+) registers", report))
    spilled = map(int, re.findall(r"(\d+) bytes spill stores", report))
    return list(zip(names, registers, spilled, strict=True))


if __name__ == "__main__":
    sys.exit(main())
