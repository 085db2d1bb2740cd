"""Native kernels: compiled when they are first asked for, kept on disk, loaded, launched.

The C++ compiler of the machine builds the CPU library, NVRTC the CUDA kernels (a library of NVIDIA's that needs no
driver, nvcc, host compiler or CUDA headers; ``pip install 'modeling-rwkv[cuda]'``). `build_cache.py` keeps what they
built.

Everything that cannot be had raises :class:`Unavailable`, the second time without trying again.
"""

import ctypes
import os
import shlex
import subprocess
import threading
from collections.abc import Callable, Hashable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch

from rwkv_kernels import build_cache
from rwkv_kernels.build_cache import digest, obtain

COMPILER_SECONDS = 300  # a compiler that takes longer hangs
KERNELS = Path(__file__).resolve().parent
NO_DEFINES: Mapping[str, str] = MappingProxyType({})
INSTALL_CUDA = "pip install 'modeling-rwkv[cuda]'"

CPU_FLAGS = ("-std=c++17", "-O3", "-fPIC", "-shared")
# Threads matter more than the newest instructions; Apple's clang has no -fopenmp. On Linux a library
# of GCC's asks for libgomp.so.1, and the one that torch has mapped answers to that name: one pool of threads,
# of the size that torch.set_num_threads says. (A torch that ships libgomp under another name still
# answers for its symbols, which it puts into the global scope.)
CPU_TARGETS = tuple(
    (*machine, *threads) for threads in (("-fopenmp",), ()) for machine in (("-march=native",), ("-mcpu=native",), ())
)

T = TypeVar("T")
_remembered: dict[Hashable, Any] = {}
_lock = threading.RLock()


class Unavailable(RuntimeError):
    """A native implementation cannot be had: a sentence says why, and one what to do about it."""


class _Rejected(Unavailable):
    """A compiler that works does not compile the source: other flags would not help."""


class Kernel:
    """A CUDA kernel on one device; keeps its module loaded. Made by :func:`cuda_kernel`."""

    def __init__(self, driver: Any, module: Any, function: Any, device: int) -> None:
        self.driver, self.module, self.function, self.device = driver, module, function, device
        self.shared_bytes = 48 * 2**10  # that a block may have, see allow


def cpu_library(source: str | Path) -> ctypes.CDLL:
    """The shared library of a C++17 source, a file beside this one or an absolute path.

    ``$CXX`` (a command, which may hold arguments), ``c++``, ``g++`` and ``clang++`` are tried in turn,
    each with the flags of ``CPU_TARGETS`` in turn.

    Raises:
        Unavailable: no compiler, or none that compiles the source.
    """
    path = KERNELS / source
    return _once(("cpu", path), lambda: _cpu_library(path))


def cubin(
    source: str | Path, arch: str, defines: Mapping[str, str] = NO_DEFINES, warnings_are_errors: bool = False
) -> bytes:
    """Machine code of a CUDA source for ``arch`` ("sm_90"); takes neither a GPU nor a driver.

    ``defines`` are macros for the preprocessor. Headers beside the source can be included.

    Raises:
        Unavailable: no NVRTC, one that does not know the architecture, or an error in the source.
    """
    path = KERNELS / source
    if warnings_are_errors:  # NVRTC has no such option, and what it said of a kept cubin is gone: compile anew
        code, messages = _nvrtc_compile(path, arch, _nvrtc_options(arch, defines))
        if "warning" in messages:
            raise Unavailable(f"{path.name} for {arch} gives a warning: {_first_error(messages, 'warning')}")
        return code

    def build() -> bytes:
        _require_posix()
        options = _nvrtc_options(arch, defines)
        key = digest(_bundle(path), repr((_nvrtc().nvrtcVersion()[1:], options)))

        def compile_to(target: Path) -> None:
            target.write_bytes(_nvrtc_compile(path, arch, options)[0])

        try:
            return obtain(key, ".cubin", compile_to, Path.read_bytes)
        except OSError as error:
            raise Unavailable(
                f"There is no room for {path.name}, compiled: {error}. Set TMPDIR to a folder."
            ) from None

    return _once(("cubin", path, arch, _frozen(defines)), build)


def compiler_report(source: str | Path, arch: str, defines: Mapping[str, str] = NO_DEFINES) -> str:
    """What the compiler says about a source: its warnings; and of each kernel, registers and spills.

    Compiles anew each time.

    Raises:
        Unavailable: as :func:`cubin` does.
    """
    path = KERNELS / source
    return _nvrtc_compile(path, arch, [*_nvrtc_options(arch, defines), "--ptxas-options=-v"])[1]


def cuda_kernel(
    source: str | Path, name: str, device: torch.device, defines: Mapping[str, str] = NO_DEFINES
) -> Kernel:
    """The ``extern "C"`` kernel ``name`` of a CUDA source, compiled for ``device`` and loaded there.

    Raises:
        Unavailable: no CUDA device, a driver that refuses the code, no such kernel, or as :func:`cubin`.
    """
    if device == torch.device("cuda"):  # whichever is the current one now
        _require_cuda()
        device = torch.device("cuda", torch.cuda.current_device())

    def load() -> Kernel:
        _require_cuda()
        major, minor = torch.cuda.get_device_capability(device)
        return _load_kernel(cubin(source, f"sm_{major}{minor}", defines), name, device.index)

    return _once(("cuda", source, name, device.index, _frozen(defines)), load)


def launch(
    kernel: Kernel,
    blocks: tuple[int, int],
    threads: int,
    arguments: ctypes.Structure,
    shared_bytes: int = 0,
    together: bool = False,
) -> None:
    """Start a kernel, whose one parameter is a structure, in rows of blocks, on torch's current stream of its device.

    That device must be the current one. Returns at once; can be captured in a graph.

    shared_bytes: memory of a block beside what the source says; above 48 KiB, ``allow`` it first.
    together: all blocks run at once, so that they can wait for each other.

    Raises:
        RuntimeError: the driver does not start it, for example because a block is too large.
    """
    driver = kernel.driver
    stream = torch.cuda.current_stream(kernel.device).cuda_stream
    parameters = (ctypes.c_void_p * 1)(ctypes.addressof(arguments))
    call: tuple[Any, ...] = kernel.function, *blocks, 1, threads, 1, 1, shared_bytes, stream
    call += (ctypes.addressof(parameters),) if together else (ctypes.addressof(parameters), 0)
    start = driver.cuLaunchCooperativeKernel if together else driver.cuLaunchKernel
    (status,) = start(*call)
    if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:  # a thread that has not used CUDA so far
        _make_current(driver, kernel.device)
        (status,) = start(*call)
    if status:
        raise RuntimeError(f"{status.name}: {blocks[0]} x {blocks[1]} blocks of {threads} threads")


def allow(kernel: Kernel, shared_bytes: int) -> None:
    """Let a block of a kernel have so much shared memory beside what the source says.

    Raises:
        Unavailable: a multiprocessor of the device has less.
    """
    if shared_bytes > kernel.shared_bytes:
        attribute = kernel.driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        (status,) = kernel.driver.cuFuncSetAttribute(kernel.function, attribute, shared_bytes)
        if status:
            raise Unavailable(f"{shared_bytes} bytes of shared memory are more than cuda:{kernel.device} has.")
        kernel.shared_bytes = shared_bytes


def clear() -> None:
    """Forget what this module loaded, and what it could not, in this process; files on disk stay."""
    with _lock:
        _remembered.clear()
        build_cache.warn_once.cache_clear()


def _once(key: Hashable, make: Callable[[], T]) -> T:
    """``make()``, or what it returned or raised the first time; threads wait for each other."""
    with _lock:
        if key not in _remembered:
            try:
                _remembered[key] = make()
            except Unavailable as reason:
                _remembered[key] = reason
        result = _remembered[key]
    if isinstance(result, Unavailable):
        raise Unavailable(str(result))  # a new one: the old one's traceback would grow with each call
    return result


def _unlock_in_child() -> None:
    """A forked child has only the thread that forked: a lock held by another would stay locked."""
    global _lock
    _lock = threading.RLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock_in_child)


def _require_posix() -> None:
    if os.name != "posix":
        raise Unavailable("Native kernels are made for Linux and macOS. Use backend='portable' here.")


# The CPU library.


def _cpu_library(source: Path) -> ctypes.CDLL:
    _require_posix()
    bundle = _bundle(source)
    reasons = []
    for command in _compilers():
        for target in CPU_TARGETS:
            try:
                return _cpu_library_by([*command, *CPU_FLAGS, *target], source, bundle)
            except FileNotFoundError:
                reasons.append(f"{command[0]}: not found")
                break
            except _Rejected as reason:
                reasons.append(str(reason))
                break
            except Unavailable as reason:
                reasons.append(str(reason))
    raise Unavailable(
        f"No C++ compiler builds {source.name} ({'; '.join(dict.fromkeys(reasons))}). "
        "Install one, for example with 'apt-get install g++', or set CXX to its command."
    )


def _compilers() -> Iterator[list[str]]:
    try:
        chosen = shlex.split(os.environ.get("CXX", ""))
    except ValueError as error:
        raise Unavailable(f"CXX is {os.environ['CXX']!r}: {error}. Quote it as for a shell.") from None
    if chosen:
        yield chosen
    yield from (["c++"], ["g++"], ["clang++"])


def _cpu_library_by(command: list[str], source: Path, bundle: bytes) -> ctypes.CDLL:
    """Raises FileNotFoundError without the compiler, Unavailable where it fails."""
    # What -march=native stands for, and the compiler's version, are among its predefined macros.
    macros = _run([*command, "-x", "c++", "-dM", "-E", os.devnull])

    def build(target: Path) -> None:
        _run([*command, "-x", "c++", os.devnull, "-o", str(target)])  # do the flags work, down to the linker?
        try:
            _run([*command, str(source), "-o", str(target)])
        except Unavailable as reason:
            raise _Rejected(str(reason)) from None

    try:
        return obtain(digest(bundle, macros, repr(command)), ".so", build, lambda path: ctypes.CDLL(str(path)))
    except OSError as error:
        raise _Rejected(f"{command[0]}: what it builds cannot be loaded: {error}") from None


def _run(command: list[str]) -> str:
    """What a program printed. No shell, and its messages in English."""
    try:
        done = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env={**os.environ, "LC_ALL": "C"},
            encoding="utf-8",
            errors="replace",
            timeout=COMPILER_SECONDS,
            check=False,
        )
    except subprocess.TimeoutExpired:
        raise Unavailable(f"{command[0]}: no answer in {COMPILER_SECONDS} seconds") from None
    except FileNotFoundError:  # for the caller: the next compiler
        raise
    except OSError as error:
        raise Unavailable(f"{command[0]}: {error.strerror}") from None
    if done.returncode:
        raise Unavailable(f"{command[0]}: {_first_error(done.stderr) or f'exit status {done.returncode}'}")
    return done.stdout


def _first_error(log: str, word: str = "error") -> str:
    """The line to show of a compiler's messages."""
    lines = [line.strip() for line in log.replace("\0", "").splitlines() if line.strip()]
    return next((line for line in lines if word in line), lines[-1] if lines else "")


# The CUDA kernels, by way of cuda.bindings: torch's CUDA wheels bring it, its calls return their errors,
# and it takes any option of NVRTC. (cuda.core, the layer above, raises exceptions that it does not export,
# and without a driver its second attempt to load a kernel never returns.)


def _nvrtc() -> Any:
    """NVRTC, once it is known to load."""
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise Unavailable(f"NVRTC, the compiler for CUDA, is missing: {reason}. Run: {INSTALL_CUDA}") from None
    return nvrtc


def _nvrtc_options(arch: str, defines: Mapping[str, str]) -> list[str]:
    macros = [f"-D{name}={value}" for name, value in sorted(defines.items())]
    return [f"--gpu-architecture={arch}", "--std=c++17", *macros]


def _nvrtc_compile(source: Path, arch: str, options: list[str]) -> tuple[bytes, str]:
    """The machine code, and what the compiler said."""
    nvrtc = _nvrtc()
    options = [*options, f"-I{source.parent}"]
    _, program = nvrtc.nvrtcCreateProgram(source.read_bytes(), source.name.encode(), 0, None, None)
    try:
        (status,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
        log = bytearray(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        messages = log.rstrip(b"\0").decode(errors="replace")
        if status:
            raise Unavailable(
                f"NVRTC {'.'.join(map(str, nvrtc.nvrtcVersion()[1:]))} does not compile {source.name} for {arch}: "
                f"{_first_error(messages)}. {_nvrtc_cure(nvrtc, arch)}"
            )
        code = bytearray(nvrtc.nvrtcGetCUBINSize(program)[1])
        nvrtc.nvrtcGetCUBIN(program, code)
        return bytes(code), messages
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _nvrtc_cure(nvrtc: Any, arch: str) -> str:
    known = [f"sm_{number}" for number in nvrtc.nvrtcGetSupportedArchs()[1]]
    if arch.rstrip("af") in known:
        return "Mend the source, or the macros that it is given."
    return f"It knows {', '.join(known)}; for a newer GPU, run: pip install --upgrade 'nvidia-cuda-nvrtc<14'"


def _require_cuda() -> None:
    if not torch.cuda.is_available() or torch.version.cuda is None:
        raise Unavailable(
            "PyTorch sees no CUDA device. Install NVIDIA's driver and a PyTorch that is built for CUDA "
            "(python -c 'import torch; print(torch.cuda.is_available())' then prints True)."
        )


def _load_kernel(code: bytes, name: str, device: int) -> Kernel:
    from cuda.bindings import driver

    def take(status: Any, *values: Any) -> Any:
        if status:
            raise Unavailable(
                f"The driver of cuda:{device} does not load the kernel {name}: {status.name}. "
                "Update NVIDIA's driver, or install the PyTorch and cuda-bindings of its CUDA version."
            )
        return values[0] if values else None

    with torch.cuda.device(device):
        _make_current(driver, device)
        module = take(*driver.cuModuleLoadData(code))
        function = take(*driver.cuModuleGetFunction(module, name.encode()))
    return Kernel(driver, module, function, device)


def _make_current(driver: Any, device: int) -> None:
    """Give this thread the context that torch uses, which is the device's primary one."""
    torch.cuda.init()
    _, context = driver.cuDevicePrimaryCtxRetain(driver.cuDeviceGet(device)[1])
    driver.cuCtxSetCurrent(context)


def _frozen(defines: Mapping[str, str]) -> Hashable:
    return tuple(sorted(defines.items()))


def _bundle(source: Path) -> bytes:
    """A source with the headers beside it, all that it may include."""
    files = [source, *sorted(source.parent.glob("*.h"))]
    return b"\0".join(part for file in files for part in (file.name.encode(), file.read_bytes()))
