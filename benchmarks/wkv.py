"""Speed of the WKV operator alone, forward and backward, on a CPU or an NVIDIA GPU.

    python benchmarks/wkv.py                                     # on the GPU if there is one; minutes
    python benchmarks/wkv.py --device cpu
    python benchmarks/wkv.py --json wkv.json --plot wkv.png
    python benchmarks/wkv.py --device cpu --shapes 2x64x32 --repeats 2      # to see it work
    PYTHONPATH=typings python benchmarks/wkv.py                  # without installing this project

Sides (`wkv_sides.py`): this project's native and portable backends and, on a GPU, flash-linear-attention's kernel
(`pip install fla-core`) and a kernel with one thread per channel, as the published ones are. They are timed by turns,
on random data. On a GPU so many inputs are taken in turn that together they exceed twice the L2 cache. Times there are
between two device events: "eager" as PyTorch calls it, launches by the host included; "graph" replayed from a CUDA
graph, the kernels alone. Speed is the fewest bytes that must move (forward: key and value read, output written;
backward: key, value, output and its gradient read, two gradients written) over time, as a share of what a copy of as
many bytes, and the fastest copy of any size, reach.

No speed while results are off. Output and gradients are compared with float64, by norm: this project's native backend
may err twice as much as the portable one in the same dtype, plus a floor for sums in another order; the portable one
by the epsilon of the dtype; other people's, which may keep in that dtype what they like, by one epsilon more. A side
that errs by more is not timed. If it is one of this project's, none is, and the exit code is 1.
"""

import argparse
import gc
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import environment, interleaved, interleaved_on_gpu, progress
from torch import Tensor
from wkv_sides import MAKERS, PEERS, Side, both, in_float64

SHAPES = {  # B, T, C
    "cpu": [(1, 1024, 768), (8, 512, 768)],
    "cuda": [
        (1, 1024, 768),
        (8, 1024, 768),
        (32, 1024, 768),
        (1, 1024, 2048),
        (8, 1024, 2048),
        (1, 8192, 2560),
        (4, 4096, 5120),
    ],
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
UNITS = {"forward": 3, "forward + backward": 9}  # tensors of (B, T, C) that must move, at least
RESULTS = ("output", "time_decay", "time_first", "key", "value")
FLOOR = 1e-5  # thousands of terms added up in float32, in any order
LARGE_COPY = 2**30  # bytes; a copy of this many is timed beside those of the shapes
SAMPLE_SECONDS = {"cpu": 0.02, "cuda": 0.002}  # of one sample, at least: many calls where they are short


@dataclass
class Inputs:
    """Arguments that require gradients, and a gradient of the output."""

    arguments: list[Tensor]
    grad_output: Tensor


def main() -> int:
    args = arguments()
    if args.device == "cpu":
        torch.set_num_threads(args.threads)
    sides, missing = make_sides(args.device)
    report: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "plot")},
        "environment": environment(["modeling-rwkv", "torch", "triton", "fla-core"]) | gpu(args.device),
        "missing": missing,
        "first": next(iter(sides)),
        "shapes": {},
    }
    if args.device == "cuda":
        report["large_copy_bytes_per_second"] = copy_speed(LARGE_COPY, args)
    for shape in args.shapes:
        label = "x".join(map(str, shape))
        progress(label)
        report["shapes"][label] = measure(shape, sides, args)
        free(args.device)
    report["agree"] = all(found["agree"] for found in report["shapes"].values())
    if args.device == "cuda" and report["agree"]:
        report["copy_bytes_per_second"] = fastest_copy(report)
    print(text(report, args))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot and report["agree"]:
        plot(report, args.plot)
    return 0 if report["agree"] else 1


def make_sides(device: str) -> tuple[dict[str, Side], dict[str, str]]:
    """Those that can run here, and why the others cannot."""
    tiny = random_inputs((1, 2, 32), torch.float32, device, torch.Generator(device).manual_seed(0))
    sides, missing = {}, {}
    for name, make in MAKERS[device].items():
        progress(f"preparing {name}")
        try:
            side = make()
            both(side, tiny.arguments, tiny.grad_output)
        except (ImportError, OSError, RuntimeError) as error:
            missing[name] = f"{type(error).__name__}: {error}".splitlines()[0]
        else:
            sides[name] = side
    return sides, missing


def gpu(device: str) -> dict[str, Any]:
    if device == "cpu":
        return {}
    properties = torch.cuda.get_device_properties()
    return {
        "gpu": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def measure(shape: tuple[int, int, int], sides: dict[str, Side], args: argparse.Namespace) -> dict[str, Any]:
    """Errors of all sides and, of those that agree with float64, the seconds of one call of each kind."""
    inputs = rotation(shape, args)
    found = compare(sides, inputs[0], DTYPES[args.dtype])
    right = {name: side for name, side in sides.items() if name not in found["off"]}
    found["agree"] = found["off"].keys() <= PEERS
    if not found["agree"]:
        return found
    unit = math.prod(shape) * DTYPES[args.dtype].itemsize
    for job, units in UNITS.items():
        progress(f"  timing {job}")
        found[job] = timed(job, right, inputs, args)
        found[job]["bytes"] = units * unit
        if args.device == "cuda":
            found[job]["copy_bytes_per_second"] = copy_speed(units * unit, args)
        free(args.device)
    return found


def rotation(shape: tuple[int, int, int], args: argparse.Namespace) -> list[Inputs]:
    """So many inputs that what the forward pass reads of them is more than twice the L2 cache, where that is known."""
    generator = torch.Generator(args.device).manual_seed(args.seed)
    count = 1
    if args.device == "cuda":
        read = 2 * math.prod(shape) * DTYPES[args.dtype].itemsize
        count = max(2, 2 * gpu("cuda")["l2_bytes"] // read + 1)
    return [random_inputs(shape, DTYPES[args.dtype], args.device, generator) for _ in range(count)]


def random_inputs(shape: tuple[int, int, int], dtype: torch.dtype, device: str, generator: torch.Generator) -> Inputs:
    """Decays and bonuses in the range of trained ones, in float32."""
    channels = shape[2]
    time_decay = torch.empty(channels, device=device).uniform_(-5, 3, generator=generator)
    time_first = torch.empty(channels, device=device).uniform_(-1.5, 0.5, generator=generator)
    key, value, grad = (torch.randn(shape, device=device, generator=generator).to(dtype) for _ in range(3))
    return Inputs([x.requires_grad_() for x in (time_decay, time_first, key, value)], grad)


def compare(sides: dict[str, Side], inputs: Inputs, dtype: torch.dtype) -> dict[str, Any]:
    """``errors`` and what is ``allowed``, by side and result; ``off``: the first result that errs by more."""
    exact = in_float64(inputs.arguments, inputs.grad_output)
    errors, allowed, off = {}, {}, {}
    for name, side in {"portable": sides["portable"], **sides}.items():
        actual = both(side, inputs.arguments, inputs.grad_output)
        errors[name] = {
            result: float((a.detach().double() - e).norm() / e.norm())
            for result, a, e in zip(RESULTS, actual, exact, strict=True)
        }
        allowed[name] = {result: limit(name, error, dtype) for result, error in errors["portable"].items()}
        for result in RESULTS:
            if not errors[name][result] <= allowed[name][result]:  # NaN is off
                off.setdefault(name, result)
    return {"errors": errors, "allowed": allowed, "off": off}


def limit(name: str, portable_error: float, dtype: torch.dtype) -> float:
    epsilon = torch.finfo(dtype).eps
    if name == "portable":
        return FLOOR + epsilon
    return 2 * portable_error + (max(FLOOR, epsilon) if name in PEERS else FLOOR)


def call(job: str, side: Side, inputs: list[Inputs]) -> list[Any]:
    """Once with each of the inputs. Results are kept to the end, so that each is written to memory of its own."""
    if job == "forward":
        with torch.no_grad():
            return [side(*one.arguments) for one in inputs]
    return [both(side, one.arguments, one.grad_output) for one in inputs]


def timed(job: str, sides: dict[str, Side], inputs: list[Inputs], args: argparse.Namespace) -> dict[str, Any]:
    """Seconds of one call, by clock and side: "wall" on a CPU, "eager" and "graph" on a GPU."""
    eager = {name: partial(call, job, side, inputs) for name, side in sides.items()}
    if args.device == "cpu":
        return {"wall": summaries(eager, len(inputs), args)}
    graphs, failures = {}, {}
    for name, pass_over_inputs in eager.items():
        try:
            graphs[name] = captured(pass_over_inputs)
        except RuntimeError as error:
            failures[name] = str(error).splitlines()[0]
    result = {"eager": summaries(eager, len(inputs), args), "graph": summaries(graphs, len(inputs), args)}
    return result | {"not_captured": failures} if failures else result


def captured(job: Callable[[], object]) -> Callable[[], object]:
    """``job`` as a CUDA graph. It runs once before, on a stream of its own, as graphs ask."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        job()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        job()
    return graph.replay


def summaries(
    jobs: dict[str, Callable[[], object]], calls_of_job: int, args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """Median, least and most seconds of one call; a job makes ``calls_of_job`` of them."""
    times = {name: passes(job, args.device) for name, job in jobs.items()}
    repeated = {name: partial(repeat, job, times[name]) for name, job in jobs.items()}
    samples = seconds(repeated, args.repeats, args.device)
    result = {}
    for name, sample in samples.items():
        each = [x / times[name] / calls_of_job for x in sample]
        result[name] = {"median": median(each), "min": min(each), "max": max(each)}
    return result


def passes(job: Callable[[], object], device: str) -> int:
    """How often a job is done in one sample; it is warm after that."""
    job()
    once = min(seconds({"": job}, 2, device)[""])
    return max(1, math.ceil(SAMPLE_SECONDS[device] / once))


def seconds(jobs: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, list[float]]:
    if device == "cuda":
        return interleaved_on_gpu(jobs, repeats)
    return {name: found.wall for name, found in interleaved(jobs, repeats).items()}


def repeat(job: Callable[[], object], times: int) -> None:
    for _ in range(times):
        job()


def copy_speed(moved: int, args: argparse.Namespace) -> float:
    """Bytes per second of device-to-device copies that read half of ``moved`` bytes and write as many."""
    pairs = max(2, 2 * gpu("cuda")["l2_bytes"] // moved + 1)
    tensors = [torch.empty(2, moved // 2, dtype=torch.uint8, device="cuda").random_() for _ in range(pairs)]

    def copy() -> None:
        for to, source in tensors:
            to.copy_(source)

    return moved / summaries({"copy": captured(copy)}, pairs, args)["copy"]["median"]


def fastest_copy(report: dict[str, Any]) -> float:
    """The ceiling: what the fastest copy of any size reached. The largest need not be it."""
    sizes = (found[job]["copy_bytes_per_second"] for found in report["shapes"].values() for job in UNITS)
    return max(report["large_copy_bytes_per_second"], *sizes)


def text(report: dict[str, Any], args: argparse.Namespace) -> str:
    env = report["environment"]
    where = f"{env['gpu']}, CUDA {env['cuda']}" if args.device == "cuda" else f"{env['cpu']}, {env['threads']} threads"
    lines = [f"WKV-4, {args.dtype}, {where}, {env['date']}"]
    lines += ["   ".join(f"{name} {version}" for name, version in env["versions"].items())]
    lines += [f"not here: {name}: {why}" for name, why in report["missing"].items()]
    for label, found in report["shapes"].items():
        for name, result in found["off"].items():
            error, allowed = found["errors"][name][result], found["allowed"][name][result]
            lines.append(f"{label}: {name} is off: {result} errs by {error:.1e}, allowed {allowed:.1e}")
        for job in UNITS:
            failures = found.get(job, {}).get("not_captured", {})
            lines += [f"{label} {job}: no graph of {name}: {why}" for name, why in failures.items()]
    if not report["agree"]:
        return "\n".join([*lines, "", "A side of this project is off: no speed is given."])
    return "\n".join([*lines, "", *(table_cpu(report) if args.device == "cpu" else table_gpu(report))])


def table_cpu(report: dict[str, Any]) -> list[str]:
    row = "{:14}{:20}{:12}{:>10} {:>22}{:>12}"
    lines = [row.format("B x T x C", "", "", "wall ms", "(min .. max)", f"x {report['first']}")]
    for label, job, name, times, _ in rows(report, "wall"):
        spread = f"({times['min'] * 1e3:.3f} .. {times['max'] * 1e3:.3f})"
        lines.append(row.format(label, job, name, f"{times['median'] * 1e3:.3f}", spread, f"{times['ratio']:.2f}"))
    return [*lines, "", f"medians, sides by turns; x {report['first']}: this side / that one; above 1, it needs more"]


def table_gpu(report: dict[str, Any]) -> list[str]:
    ceiling = report["copy_bytes_per_second"]
    row = "{:14}{:20}{:12}{:>10}{:>10}{:>12}{:>8}{:>9}{:>10}"
    head = ("B x T x C", "", "", "eager us", "graph us", f"x {report['first']}", "GB/s", "of copy", "of best")
    large = report["large_copy_bytes_per_second"]
    lines = [
        f"copies, read and written: the fastest {ceiling / 1e9:.0f} GB/s, that of a GiB {large / 1e9:.0f} GB/s",
        "",
    ]
    lines += [row.format(*head)]
    for label, job, name, times, found in rows(report, "eager"):
        graph = found["graph"].get(name)
        cells = [label, job, name, f"{times['median'] * 1e6:.1f}"]
        if graph:
            speed = found["bytes"] / graph["median"]
            cells += [
                f"{graph['median'] * 1e6:.1f}",
                f"{ratio(report, found['graph'], name):.2f}",
                f"{speed / 1e9:.0f}",
            ]
            cells += [f"{speed / found['copy_bytes_per_second']:.0%}", f"{speed / ceiling:.0%}"]
        lines.append(row.format(*cells, *["-"] * (9 - len(cells))))
    lines += ["", f"medians, sides by turns; x {report['first']}: this side / that one; above 1, it needs more"]
    return [
        *lines,
        "of copy: share of what a copy of as many bytes reaches; of best: of what the fastest copy does",
    ]


def rows(report: dict[str, Any], clock: str) -> list[tuple[str, str, str, dict[str, float], dict[str, Any]]]:
    return [
        (label, job, name, times | {"ratio": ratio(report, found[job][clock], name)}, found[job])
        for label, found in report["shapes"].items()
        for job in UNITS
        for name, times in found[job][clock].items()
    ]


def ratio(report: dict[str, Any], times: dict[str, Any], name: str) -> float:
    first = times.get(report["first"], {"median": math.nan})
    return times[name]["median"] / first["median"]


def plot(report: dict[str, Any], path: Path) -> None:
    """On a GPU the share of the fastest copy's bandwidth; on a CPU bytes per second. A panel for each job."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    on_gpu = "copy_bytes_per_second" in report
    clock, unit = ("graph", report["copy_bytes_per_second"] / 100) if on_gpu else ("wall", 1e9)
    labels, names = list(report["shapes"]), list(MAKERS[report["settings"]["device"]])
    width = 0.8 / len(names)
    figure, axes = pyplot.subplots(
        1, len(UNITS), figsize=(4 + 1.6 * len(labels), 4), layout="constrained", sharey=True
    )
    for axis, job in zip(axes, UNITS, strict=True):
        found = [report["shapes"][label][job] for label in labels]
        for i, name in enumerate(names):
            bars = {x: f["bytes"] / f[clock][name]["median"] / unit for x, f in enumerate(found) if name in f[clock]}
            if bars:
                axis.bar([x + i * width for x in bars], list(bars.values()), width, label=name, color=f"C{i}")
        axis.set_xticks([x + 0.4 - width / 2 for x in range(len(labels))], labels, rotation=20)
        axis.set(title=job)
    axes[0].set(ylabel="percent of the fastest copy's bandwidth" if on_gpu else "GB/s")
    axes[0].legend()
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=SHAPES, help="default: cuda if there is a GPU")
    parser.add_argument("--shapes", type=shape, nargs="+", metavar="BxTxC")
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on a GPU, float32 on a CPU")
    parser.add_argument("--repeats", type=int, default=11, help="samples of each measurement")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of the data")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.dtype = args.dtype or {"cpu": "float32", "cuda": "bfloat16"}[args.device]
    args.shapes = args.shapes or SHAPES[args.device]
    return args


def shape(text: str) -> tuple[int, int, int]:
    batch, time, channels = map(int, text.split("x"))
    return batch, time, channels


if __name__ == "__main__":
    sys.exit(main())
