"""Fair timing and memory, for every benchmark in this folder.

Sides are timed in turn, not one after the other, so that whatever else the machine does meets all of them alike. Wall
time is what a user waits for; CPU time, of all threads, is given beside it because other programs disturb it less.
"""

import datetime
import os
import platform
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path
from statistics import median

import torch

MEMORY = (
    "resident memory above what was resident before, model loaded and warm, sampled every millisecond in a process of "
    "its own; there glibc gives freed memory back at once, so that the peak is what is in use, not what it hoards"
)
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}  # without it, peaks of one and the same model differ by a third


@dataclass
class Seconds:
    """One sample for each repeat, in the order of time."""

    wall: list[float]
    cpu: list[float]

    def summary(self) -> dict[str, dict[str, float | list[float]]]:
        return {
            clock: {"median": median(samples), "min": min(samples), "max": max(samples), "samples": samples}
            for clock, samples in asdict(self).items()
        }


def progress(what: str) -> None:
    """On stderr: stdout is for results."""
    print(f"[{time.strftime('%X')}] {what}", file=sys.stderr, flush=True)


def turns(names: list[str], repeats: int, at_most: float = 0.0) -> Iterator[str]:
    """Every name ``repeats`` times, by turns, each turn beginning with another one.

    Up to four times as many turns are taken while fewer than ``at_most`` seconds have passed: short jobs need more.
    """
    begin = time.perf_counter()
    turn = 0
    while turn < repeats or (turn < 4 * repeats and time.perf_counter() - begin < at_most):
        first = turn % len(names)
        yield from names[first:] + names[:first]
        turn += 1


def interleaved(jobs: Mapping[str, Callable[[], object]], repeats: int, at_most: float = 0.0) -> dict[str, Seconds]:
    """Time every job by ``turns``. Warm them up before."""
    seconds = {name: Seconds([], []) for name in jobs}
    for name in turns(list(jobs), repeats, at_most):
        wall, cpu = time.perf_counter(), time.process_time()
        jobs[name]()
        seconds[name].wall.append(time.perf_counter() - wall)
        seconds[name].cpu.append(time.process_time() - cpu)
    return seconds


def interleaved_on_gpu(jobs: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds on the device between an event before each job and one after it, by ``turns``. Warm them up before."""
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in jobs}
    for name in turns(list(jobs), repeats):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()  # nothing is queued: what the host needs to launch the job counts
        begin.record()
        jobs[name]()
        end.record()
        events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: [begin.elapsed_time(end) / 1e3 for begin, end in pairs] for name, pairs in events.items()}


def peak_memory(job: Callable[[], object], interval: float = 1e-3) -> int:
    """Bytes by which resident memory rises while ``job`` runs, in a process with ``GIVE_BACK``: see ``MEMORY``."""
    import psutil  # the other benchmarks do without

    process = psutil.Process()
    before = peak = process.memory_info().rss
    finished = threading.Event()

    def sample() -> None:
        nonlocal peak
        while not finished.wait(interval):
            peak = max(peak, process.memory_info().rss)

    sampler = threading.Thread(target=sample)
    sampler.start()
    try:
        job()
    finally:
        finished.set()
        sampler.join()
    return max(peak, process.memory_info().rss) - before


def alone(*options: str) -> str:
    """What the running program prints with ``options`` added, in a process of its own with ``GIVE_BACK``."""
    progress(f"in a process of its own: {' '.join(options)}")
    command = [sys.executable, *sys.argv, *options]
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | GIVE_BACK).stdout


def environment(packages: list[str]) -> dict[str, object]:
    """What the figures depend on besides the code: written beside them."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],
        "system": platform.platform(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
    }


def version(package: str) -> str:
    """Of a package that may be on the path without being installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]} {torch.backends.cpu.get_cpu_capability()}" if names else platform.processor()
