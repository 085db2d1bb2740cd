"""Laws of the loader: one compilation, an entry is whole or gone, a folder is private, a failure has a cure."""

import ctypes
import multiprocessing
import os
import shlex
import shutil
import stat
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import pytest
import torch

from rwkv_kernels import build_cache, loader

COMPILER = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
needs_compiler = pytest.mark.skipif(COMPILER is None, reason="no C++ compiler")
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files to another user")

CPP = '#include "answer.h"\nextern "C" int answer() { return ANSWER; }\n'
CUDA = """
#include "answer.h"
#ifndef ELEMENT
#define ELEMENT float
#endif
struct Arguments {
    ELEMENT* x;
    long long n;
};
extern "C" __global__ void fill(const __grid_constant__ Arguments all) {
    long long i = blockIdx.x * (long long)blockDim.x + threadIdx.x;
    if (i < all.n) all.x[i] = (ELEMENT)ANSWER;
}
"""


class Arguments(ctypes.Structure):
    _fields_ = [("x", ctypes.c_void_p), ("n", ctypes.c_int64)]


ARCHITECTURES = ("sm_80", "sm_90", "sm_100")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """A cache of this test's own; nothing is remembered from another, and no CXX is set."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("RWKV_CACHE_DIR", str(folder))
    monkeypatch.delenv("CXX", raising=False)
    loader.clear()
    yield folder
    loader.clear()


@pytest.fixture
def source(tmp_path) -> Path:
    """A C++ source with its header."""
    (tmp_path / "answer.h").write_text("#define ANSWER 42\n")
    path = tmp_path / "answer.cpp"
    path.write_text(CPP)
    return path


@pytest.fixture
def cuda_source(source) -> Path:
    path = source.with_suffix(".cu")
    path.write_text(CUDA)
    return path


@pytest.fixture
def compilations(tmp_path, monkeypatch) -> Path:
    """Makes CXX a wrapper of the compiler; the file it returns gets a line per source compiled."""
    log = tmp_path / "compilations"
    log.touch()
    wrapper = tmp_path / "counting-c++"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *answer.cpp*) echo "$*" >>{shlex.quote(str(log))};; esac\nexec {COMPILER} "$@"\n'
    )
    wrapper.chmod(0o700)
    monkeypatch.setenv("CXX", str(wrapper))
    return log


def count(log: Path) -> int:
    return len(log.read_text().splitlines())


def entries(folder: Path, suffix: str = ".so") -> list[Path]:
    return sorted(folder.glob(f"*{suffix}"))


def answer(source: Path) -> int:
    return loader.cpu_library(source).answer()


def script(path: Path, text: str) -> Path:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o700)
    return path


# Compiling.


@needs_compiler
def test_a_library_is_compiled_once_and_kept(source, cache, compilations):
    assert answer(source) == 42
    assert loader.cpu_library(source) is loader.cpu_library(source)
    loader.clear()
    assert answer(source) == 42
    assert count(compilations) == 1
    assert len(entries(cache)) == 1
    assert stat.S_IMODE(cache.stat().st_mode) == 0o700
    assert not [path for path in cache.iterdir() if ".tmp" in path.name]


@needs_compiler
@pytest.mark.parametrize("umask", [0o000, 0o002, 0o077])
def test_entries_are_private_under_any_umask(umask, source, cache, compilations):
    before = os.umask(umask)
    try:
        answer(source)
        loader.clear()
        answer(source)
    finally:
        os.umask(before)
    assert count(compilations) == 1
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in entries(cache))


@needs_compiler
@pytest.mark.parametrize("change", ["source", "header", "compiler arguments"])
def test_whatever_goes_in_is_part_of_the_key(change, source, cache, monkeypatch):
    answer(source)
    expected = 43
    if change == "source":
        source.write_text(CPP.replace("ANSWER;", "ANSWER + 1;"))
    elif change == "header":
        source.with_name("answer.h").write_text("#define ANSWER 43\n")
    else:
        monkeypatch.setenv("CXX", f"{COMPILER} '-DTWO WORDS' -DUNUSED=1")
        expected = 42
    loader.clear()
    assert answer(source) == expected
    assert len(entries(cache)) == 2


def fork(count: int, work, *args) -> list[multiprocessing.Process]:
    """Processes that have torch imported already, without the seconds which that takes each."""
    processes = [multiprocessing.get_context("fork").Process(target=work, args=args) for _ in range(count)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork in a process with threads
        for process in processes:
            process.start()
    return processes


def answer_together(source: Path, barrier) -> None:
    warnings.simplefilter("error")
    barrier.wait()
    assert answer(source) == 42


@needs_compiler
def test_where_a_source_lies_is_no_part_of_the_key(source, cuda_source, cache):
    """Two installations share the entries."""
    other = source.parent / "other"
    other.mkdir()
    for file in (source, cuda_source, source.with_name("answer.h")):
        shutil.copy(file, other)
    for folder in (source.parent, other):
        assert answer(folder / source.name) == 42
        loader.cubin(folder / cuda_source.name, "sm_90")
    assert len(entries(cache)) == len(entries(cache, ".cubin")) == 1


@needs_compiler
def test_sixteen_processes_compile_once(source, cache, compilations):
    processes = fork(16, answer_together, source, multiprocessing.get_context("fork").Barrier(16))
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 16
    assert count(compilations) == 1
    assert len(entries(cache)) == 1


@needs_compiler
def test_threads_compile_once(source, compilations):
    libraries = []
    threads = [threading.Thread(target=lambda: libraries.append(loader.cpu_library(source))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(libraries) == 8 and len(set(map(id, libraries))) == 1
    assert count(compilations) == 1


@needs_compiler
def test_a_fork_while_another_thread_compiles_does_not_hang(source):
    """The child has a lock of its own: the thread that held the parent's does not exist there."""
    taken, done = threading.Event(), threading.Event()

    def hold():
        with loader._lock:
            taken.set()
            done.wait()

    holder = threading.Thread(target=hold)
    holder.start()
    taken.wait()
    (child,) = fork(1, answer, source)
    child.join(60)
    done.set()
    holder.join()
    assert child.exitcode == 0


@needs_compiler
@pytest.mark.parametrize("missing", ["-march=native", "-fopenmp", "-march=native -mcpu=native -fopenmp"])
def test_a_compiler_without_a_flag_does_without(missing, source, tmp_path, monkeypatch):
    refused = "|".join(f"*{flag}*" for flag in missing.split())
    text = f'case "$*" in {refused}) echo "error: no such flag" >&2; exit 1;; esac\nexec {COMPILER} "$@"'
    monkeypatch.setenv("CXX", str(script(tmp_path / "old-c++", text)))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    assert answer(source) == 42


@needs_compiler
@pytest.mark.parametrize("broken", ["not-there", "false", "/", "crashing", "{source}"])
def test_the_next_compiler_is_tried(broken, source, tmp_path, monkeypatch):
    script(tmp_path / "crashing", "kill -9 $$")
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CXX", broken.format(source=source))
    assert answer(source) == 42


@needs_compiler
def test_threads_of_the_library_are_those_of_torch(tmp_path):
    """One pool of threads: OpenMP of the library is the one that torch has mapped."""
    path = tmp_path / "threads.cpp"
    path.write_text(
        "#ifdef _OPENMP\n#include <omp.h>\n#endif\n"
        'extern "C" int threads() {\n#ifdef _OPENMP\nreturn omp_get_max_threads();\n#else\nreturn 0;\n#endif\n}\n'
    )
    library = loader.cpu_library(path)
    if not library.threads():
        pytest.skip("the compiler has no OpenMP")
    before = torch.get_num_threads()
    try:
        for number in (1, 3):
            torch.set_num_threads(number)
            assert library.threads() == number
    finally:
        torch.set_num_threads(before)


# The cache.


@needs_compiler
@pytest.mark.parametrize("damage", ["truncated", "empty", "foreign", "symlink", "writable by others"])
def test_a_bad_entry_is_rebuilt(damage, source, cache, compilations, tmp_path):
    answer(source)
    (entry,) = entries(cache)
    content = entry.read_bytes()
    entry.unlink()  # it is still mapped here
    if damage == "symlink":
        (tmp_path / "elsewhere").write_bytes(content)
        entry.symlink_to(tmp_path / "elsewhere")
    else:
        entry.write_bytes({"truncated": content[:-100], "empty": b"", "foreign": b"#!/bin/sh\n"}.get(damage, content))
        entry.chmod(0o666 if damage == "writable by others" else 0o600)
    loader.clear()
    assert answer(source) == 42
    assert count(compilations) == 2
    (entry,) = entries(cache)
    assert entry.read_bytes() == content and not entry.is_symlink()


@needs_root
@needs_compiler
def test_an_entry_of_another_user_is_rebuilt(source, cache, compilations):
    answer(source)
    os.chown(entries(cache)[0], 12345, 12345)
    loader.clear()
    assert answer(source) == 42
    assert count(compilations) == 2
    assert entries(cache)[0].stat().st_uid == 0


@needs_compiler
def test_what_a_killed_process_left_is_replaced(source, cache):
    answer(source)
    (entry,) = entries(cache)
    key = entry.name.partition("-")[0]
    entry.rename(cache / f"{key}.tmp.so")
    loader.clear()
    assert answer(source) == 42
    assert entries(cache) == [entry]


@needs_compiler
@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777, 0o1777])
def test_a_folder_that_others_can_write_to_is_bypassed(mode, source, cache):
    cache.mkdir()
    cache.chmod(mode)
    with pytest.warns(RuntimeWarning, match=f"chmod go-w {cache}"):
        assert answer(source) == 42
    assert not list(cache.iterdir())
    cache.chmod(0o755)  # others may read
    loader.clear()
    assert answer(source) == 42
    assert entries(cache)


@needs_root
@needs_compiler
def test_a_folder_of_another_user_is_bypassed(source, cache):
    cache.mkdir(mode=0o700)
    os.chown(cache, 12345, 12345)
    with pytest.warns(RuntimeWarning, match=f"{cache}, belongs to another user.*RWKV_CACHE_DIR"):
        assert answer(source) == 42
    assert not list(cache.iterdir())


@needs_compiler
@pytest.mark.parametrize("obstacle", ["a file", "below a file", "dangling link", "folder in place of an entry"])
def test_an_unusable_cache_is_bypassed(obstacle, source, cache, monkeypatch):
    if obstacle == "folder in place of an entry":
        answer(source)
        (entry,) = entries(cache)
        entry.unlink()
        (entry / "full").mkdir(parents=True)
    elif obstacle == "dangling link":
        cache.symlink_to(cache.with_name("nowhere"))
    else:
        cache.touch()
        if obstacle == "below a file":
            monkeypatch.setenv("RWKV_CACHE_DIR", str(cache / "folder"))
    loader.clear()
    with pytest.warns(RuntimeWarning, match="RWKV_CACHE_DIR"):
        assert answer(source) == 42


@needs_compiler
@pytest.mark.parametrize("failing", ["os.replace", "filelock.FileLock.acquire"])
def test_a_full_disk_or_a_lock_that_is_not_to_be_had_is_bypassed(failing, source, monkeypatch):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(failing, fail)
    with pytest.warns(RuntimeWarning, match="No space left on device"):
        assert answer(source) == 42


def test_the_cache_is_the_users_own_by_default(monkeypatch, tmp_path):
    monkeypatch.delenv("RWKV_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path))
    folder, _ = build_cache.folder_or_reason()
    assert folder.is_relative_to(tmp_path.resolve()) and "modeling-rwkv" in folder.parts


# Failures.


def test_no_compiler_has_a_cure_and_is_remembered(source, tmp_path, monkeypatch):
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setenv("CXX", "my-compiler -v")
    with pytest.raises(loader.Unavailable, match=r"my-compiler: not found; .*apt-get install g\+\+.* or set CXX"):
        loader.cpu_library(source)
    monkeypatch.undo()
    with pytest.raises(loader.Unavailable, match="my-compiler"):
        loader.cpu_library(source)


@needs_compiler
def test_an_error_in_the_source_names_the_compiler_and_the_line(source, compilations, cache):
    source.write_text(CPP + "oops;\n")
    with pytest.raises(loader.Unavailable, match=r"counting-c\+\+: .*answer.cpp:3:1: error: .*oops"):
        loader.cpu_library(source)
    assert count(compilations) == 1  # other flags would not help
    with pytest.raises(loader.Unavailable):
        loader.cpu_library(source)
    assert count(compilations) == 1
    assert not entries(cache)


def test_a_malformed_cxx_is_named(source, monkeypatch):
    monkeypatch.setenv("CXX", "c++ '-O3")
    with pytest.raises(loader.Unavailable, match=r"CXX is .*No closing quotation"):
        loader.cpu_library(source)


@needs_compiler
def test_a_library_that_does_not_load_is_unavailable(source):
    source.write_text('extern "C" int missing();\n' + CPP.replace("ANSWER;", "missing();"))
    with pytest.raises(loader.Unavailable, match=r"cannot be loaded: .*missing"):
        loader.cpu_library(source)


def test_import_compiles_nothing_and_leaves_cuda_alone(cache):
    code = "import sys, torch; old = set(sys.modules); import rwkv_kernels.loader; print(*set(sys.modules) - old)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "rwkv_kernels.loader" in done.stdout.split()
    assert not [name for name in done.stdout.split() if name.startswith("cuda")]
    assert not cache.exists()


# CUDA: NVRTC needs neither a GPU nor a driver.


@pytest.mark.parametrize("element", ["float", "double"])
@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_a_cubin_is_compiled_for_any_architecture(arch, element, cuda_source, cache):
    code = loader.cubin(cuda_source, arch, {"ELEMENT": element})
    assert code.startswith(b"\x7fELF") and b"fill" in code
    assert [path.read_bytes() for path in entries(cache, ".cubin")] == [code]


def test_a_cubin_is_kept(cuda_source, cache, monkeypatch):
    code = loader.cubin(cuda_source, "sm_90")
    loader.clear()
    monkeypatch.setattr(loader, "_nvrtc_compile", None)
    assert loader.cubin(cuda_source, "sm_90") == code


def test_a_truncated_cubin_is_rebuilt(cuda_source, cache):
    code = loader.cubin(cuda_source, "sm_90")
    (entry,) = entries(cache, ".cubin")
    entry.write_bytes(code[:-10])
    loader.clear()
    assert loader.cubin(cuda_source, "sm_90") == code
    assert entry.read_bytes() == code


def test_macros_headers_and_architectures_are_part_of_the_key(cuda_source, cache):
    loader.cubin(cuda_source, "sm_90")
    loader.cubin(cuda_source, "sm_80")
    loader.cubin(cuda_source, "sm_90", {"ELEMENT": "double"})
    cuda_source.with_name("answer.h").write_text("#define ANSWER 43\n")
    loader.clear()
    loader.cubin(cuda_source, "sm_90")
    assert len(entries(cache, ".cubin")) == 4


def test_warnings_can_be_errors(cuda_source):
    code = loader.cubin(cuda_source, "sm_90")
    assert loader.cubin(cuda_source, "sm_90", warnings_are_errors=True) == code
    cuda_source.write_text(CUDA + "static __device__ int idle() { int unused; return 1; }\n")
    loader.clear()
    loader.cubin(cuda_source, "sm_90")
    with pytest.raises(loader.Unavailable, match=r"answer.cu for sm_90 .*warning"):
        loader.cubin(cuda_source, "sm_90", warnings_are_errors=True)


def test_the_report_counts_registers_and_spills(cuda_source):
    report = loader.compiler_report(cuda_source, "sm_90")
    assert "fill" in report and "registers" in report and "spill stores" in report


def test_an_error_in_a_cuda_source_names_the_line(cuda_source):
    cuda_source.write_text(CUDA + "oops;\n")
    with pytest.raises(loader.Unavailable, match=r"NVRTC .* answer.cu for sm_90: answer.cu\(\d+\): error.*Mend"):
        loader.cubin(cuda_source, "sm_90")


def test_an_unknown_architecture_has_a_cure(cuda_source):
    with pytest.raises(loader.Unavailable, match=r"sm_999.*It knows .*sm_90.*--upgrade"):
        loader.cubin(cuda_source, "sm_999")


def test_missing_nvrtc_has_a_cure(cuda_source, monkeypatch):
    monkeypatch.setitem(sys.modules, "cuda.bindings", None)
    with pytest.raises(loader.Unavailable, match=r"pip install 'modeling-rwkv\[cuda\]'"):
        loader.cubin(cuda_source, "sm_90")


@pytest.mark.skipif(torch.cuda.is_available(), reason="for machines without a GPU")
def test_no_device_has_a_cure(cuda_source):
    with pytest.raises(loader.Unavailable, match="PyTorch sees no CUDA device"):
        loader.cuda_kernel(cuda_source, "fill", torch.device("cuda"))


@needs_gpu
@pytest.mark.parametrize(("dtype", "element"), [(torch.float32, "float"), (torch.float64, "double")])
def test_a_kernel_runs(dtype, element, cuda_source):
    kernel = loader.cuda_kernel(cuda_source, "fill", torch.device("cuda"), {"ELEMENT": element})
    x = torch.zeros(1000, dtype=dtype, device="cuda")
    loader.launch(kernel, (4, 1), 256, Arguments(x.data_ptr(), 999))
    assert x.tolist() == [42.0] * 999 + [0.0]


@needs_gpu
def test_a_kernel_runs_on_the_current_stream_in_a_graph_and_in_a_new_thread(cuda_source):
    kernel = loader.cuda_kernel(cuda_source, "fill", torch.device("cuda"))
    x = torch.zeros(256, device="cuda")
    run = lambda: loader.launch(kernel, (1, 1), 256, Arguments(x.data_ptr(), 256))  # noqa: E731
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    assert not x.any()
    graph.replay()
    assert (x == 42).all()
    x.zero_()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert (x == 42).all()


@needs_gpu
def test_what_the_driver_refuses_is_named(cuda_source):
    kernel = loader.cuda_kernel(cuda_source, "fill", torch.device("cuda"))
    x = torch.zeros(1, device="cuda")
    with pytest.raises(RuntimeError, match="CUDA_ERROR_INVALID_VALUE: 1 x 1 blocks of 2048 threads"):
        loader.launch(kernel, (1, 1), 2048, Arguments(x.data_ptr(), 1))
    with pytest.raises(loader.Unavailable, match="does not load the kernel nothing: CUDA_ERROR_NOT_FOUND"):
        loader.cuda_kernel(cuda_source, "nothing", torch.device("cuda"))
