r"""How fast text is written on a CPU, beside peers and beside how fast this machine reads the weights.

    python benchmarks/generate.py                                  # the 169M shape, a prompt of 16, 64 new tokens
    python benchmarks/generate.py --json generate.json --plot generate.png
    python benchmarks/generate.py --sides ours --dtypes bfloat16 int8 --starts 16 16000     # int8; far into a text
    python benchmarks/generate.py --shape 430m --prompts 16 1024 --tokens 64 512 --batches 1 8 32 --memory \
        --json generate-430m.json --resume                  # hours: again, and it goes on where it was interrupted
    python benchmarks/generate.py --prompts 100000 --tokens 3 --repeats 1 --sides ours "ours, at once" --memory
    python benchmarks/generate.py --shape tiny --tokens 4 8 --repeats 2                             # to see it work

Sides (`sides.py`): ours; ours with ``native_decoding`` off, module by module; if asked for, ours with prompts read at
once, however long, which is ``prefill_tokens = None``; the model built into transformers; the
official `rwkv` package; GPT-NeoX with its KV cache. The likeliest token each time, by transformers' own `generate`, or
by a loop where there is none. The RWKV-4 sides hold the same random weights, and in float32 must begin with the same
eight tokens; if not, no speed is printed and the exit code is 1. Built-in and official write one row: of batches, the
former gives wrong results and the latter knows none.

int8: every matrix by torchao's `Int8WeightOnlyConfig()`, the rest in bfloat16; ours only. `--starts`: tokens a second
after so many tokens, read before and not counted, by turns.

Reading a token's weights (all but the embeddings, of which a token needs one row), in a loop that adds them up, is
timed by turns with the sides. No program that reads each of them once is faster: that is the ceiling. Its median is
what medians of tokens are compared with; on machines whose memory others use, too, the fastest may be twice as fast.
"kernel" is the share of ours that is spent where weights are read, and so not in Python.
"""

import argparse
import ctypes
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any
from unittest import mock

import torch
from measure import MEMORY, alone, environment, peak_memory, progress, turns
from sides import SHAPES, SIDES
from torch import Tensor
from transformers.generation.streamers import BaseStreamer

from modeling_rwkv import RwkvCache, RwkvForCausalLM
from rwkv_kernels import decode_cpu
from rwkv_kernels.loader import cpu_library

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "int8": torch.bfloat16}
OURS, MODULES, AT_ONCE, READING = "ours", "ours, by modules", "ours, at once", "reading weights"
PIECE = RwkvForCausalLM.prefill_tokens
WAYS = {OURS: (True, PIECE), MODULES: (False, PIECE), AT_ONCE: (True, None)}  # native_decoding, prefill_tokens
WRITERS = (*WAYS, "built-in", "official", "GPT-NeoX")
SAME = (*WAYS, "built-in", "official")  # the same function of the same weights
ONE_ROW = ("built-in", "official")
WINDOWS = 16  # of positions, in the plot
KEPT = (
    "shape",
    "sides",
    "repeats",
    "reads",
    "threads",
    "seed",
    "memory",
)  # settings of figures that go into one report


@dataclass(frozen=True)
class Work:
    dtype: str
    prompt: int
    tokens: int
    batch: int

    def __str__(self) -> str:
        return f"{self.dtype}, {self.batch} x ({self.prompt} + {self.tokens})"


class Clock(BaseStreamer):
    """When each token came; `generate` puts the prompt first."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.ids: list[Tensor] = []

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        self.ids.append(value)

    def end(self) -> None:
        """Nothing is left to show."""


def write(name: str, model: Any, ids: Tensor, tokens: int, past: RwkvCache | None = None) -> Clock:
    """``tokens`` more, greedily: the times at which the work began and each token was there, and tokens (B,).

    past: of ours, what was read before ``ids``.
    """
    clock = Clock()
    if name == "official":
        clock.put(ids)
        logits, state = model.forward(ids[0].tolist(), None)
        for _ in range(tokens):
            clock.put(logits.argmax()[None])
            if len(clock.times) <= tokens:
                logits, state = model.forward([int(clock.ids[-1])], state)
        return clock
    if name in WAYS:
        model.native_decoding, model.prefill_tokens = WAYS[name]
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=tokens,
        do_sample=False,
        use_cache=True,
        past_key_values=past,
        streamer=clock,
    )
    return clock


@contextmanager
def kernel_time() -> Iterator[list[float]]:
    """Collects the seconds of each native step."""
    seconds: list[float] = []
    step = decode_cpu.Decoder.step

    def timed(*args: Any) -> Any:
        begin = time.perf_counter()
        result = step(*args)
        seconds.append(time.perf_counter() - begin)
        return result

    with mock.patch.object(decode_cpu.Decoder, "step", timed):
        yield seconds


def read_weights(weights: Tensor) -> float:
    """Seconds to read them once."""
    read = cpu_library(Path(__file__).with_name("read_memory.cpp")).read_memory
    read.argtypes = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
    begin = time.perf_counter()
    read(weights.data_ptr(), weights.numel(), torch.get_num_threads())
    return time.perf_counter() - begin


def load(name: str, shape: str, seed: int, dtype: str) -> Any:
    model = SIDES[name].load(shape, seed, DTYPES[dtype]).model
    if name != "official":
        model.eval().generation_config.update(eos_token_id=None, pad_token_id=None)
    if dtype == "int8":
        from torchao.quantization import Int8WeightOnlyConfig, quantize_

        quantize_(model, Int8WeightOnlyConfig())
    return model


def weight_bytes(model: Any) -> int:
    """Of what each token reads."""
    embeddings = model.get_input_embeddings().weight
    parts = [(x.qdata, x.scale) if hasattr(x, "qdata") else (x,) for x in model.parameters() if x is not embeddings]
    return sum(x.numel() * x.element_size() for part in parts for x in part)


def measure(dtype: str, args: argparse.Namespace, report: dict[str, Any]) -> None:
    """All work of one dtype that is not in ``report`` yet, into it."""
    left = [work for work in works(dtype, args) if str(work) not in report["work"]]
    if not left and (not args.starts or dtype in report["starts"]):
        return
    progress(f"loading {dtype}")
    writers = [name for name in args.sides if name == OURS or dtype != "int8"]
    loaded = {name: load(name, args.shape, args.seed, dtype) for name in writers if name == OURS or name not in WAYS}
    loaded |= dict.fromkeys(set(writers) & set(WAYS), loaded[OURS])
    size = weight_bytes(loaded[OURS])
    weights = torch.ones(size // 4, dtype=torch.int32)
    report["weight_bytes"][dtype] = size
    for work in left:
        sides = [name for name in writers if work.batch == 1 or name not in ONE_ROW]
        ids = prompt(work, args)
        jobs: dict[str, Callable[[], Clock]] = {
            name: partial(write, name, loaded[name], ids, work.tokens) for name in sides
        }
        warm = {name: torch.stack(write(name, loaded[name], ids, 8).ids[1:]).tolist() for name in sides}
        alike = [name for name in sides if name in SAME]
        report["disagree"] += [f"{work}: {name}" for name in alike if dtype == "float32" and warm[name] != warm[OURS]]
        progress(f"timing {work}")
        clocks: dict[str, list[list[float]]] = {name: [] for name in sides}
        reading: list[float] = []
        in_kernel: list[float] = []
        for name in turns([*sides, READING], args.repeats):
            if name == READING:
                reading += [read_weights(weights) for _ in range(args.reads)]
                continue
            with kernel_time() as seconds:
                times = jobs[name]().times
            clocks[name].append(times)
            if name == OURS:
                in_kernel.append(sum(seconds) / (times[-1] - times[1]))
        report["work"][str(work)] = vars(work) | summary(work, clocks, reading) | {"in_kernel": median(in_kernel)}
        if args.memory:
            peaks = {name: int(alone("--peak-of", json.dumps(vars(work)), name)) for name in sides}
            report["work"][str(work)]["peak_bytes"] = peaks
        save(report, args.json)
    if args.starts:
        report["starts"][dtype] = measure_starts(loaded[OURS], args)
        save(report, args.json)


def measure_starts(model: Any, args: argparse.Namespace) -> dict[int, list[float]]:
    """Tokens a second after so many tokens, by turns."""
    tokens, speeds = max(args.tokens), {start: [] for start in args.starts}
    text = torch.randint(SHAPES[args.shape][-1], (1, max(args.starts) + 1))
    with torch.no_grad():
        caches = {n: model(text[:, :n], use_cache=True, logits_to_keep=1).past_key_values for n in args.starts}
    progress(f"timing after {args.starts} tokens")
    for name in turns([str(n) for n in args.starts], args.repeats):
        times = write(OURS, model, text[:, -1:], tokens, caches[int(name)].clone()).times
        speeds[int(name)].append((tokens - 1) / (times[-1] - times[1]))
    return speeds


def works(dtype: str, args: argparse.Namespace) -> list[Work]:
    return [Work(dtype, p, n, b) for p in args.prompts for n in args.tokens for b in args.batches]


def prompt(work: Work, args: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(SHAPES[args.shape][-1], (work.batch, work.prompt), generator=generator)


def summary(work: Work, clocks: dict[str, list[list[float]]], reading: list[float]) -> dict[str, Any]:
    """Medians. A token's time is counted from the one before; the first one's, from the start, is the prompt's."""
    ceiling = work.batch / median(reading)
    result: dict[str, Any] = {"ceiling": ceiling, "reading_seconds": reading, "sides": {}}
    for name, runs in clocks.items():
        speeds = [work.batch * (work.tokens - 1) / (times[-1] - times[1]) for times in runs]
        steps = torch.tensor(runs, dtype=torch.float64).diff()[:, 1:].median(0).values
        windows = steps.tensor_split(min(WINDOWS, len(steps)))
        result["sides"][name] = {
            "tokens_per_second": median(speeds),
            "slowest": min(speeds),
            "fastest": max(speeds),
            "share_of_ceiling": median(speeds) / ceiling,
            "first_token_seconds": median(times[1] - times[0] for times in runs),
            "speed_by_position": [work.batch / float(window.mean()) for window in windows],
        }
    return result


def peak_of(work: Work, name: str, args: argparse.Namespace) -> int:
    model = load(OURS if name in WAYS else name, args.shape, args.seed, work.dtype)
    write(name, model, prompt(work, args)[:, :8], 4)
    return peak_memory(lambda: write(name, model, prompt(work, args), work.tokens))


def begin(args: argparse.Namespace) -> dict[str, Any]:
    """A report without figures, or with those of ``args.json`` if they are to be kept.

    Raises:
        ValueError: these were measured otherwise, or elsewhere.
    """
    report: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "plot", "peak_of")},
        "environment": environment(["modeling-rwkv", "torch", "transformers", "rwkv"]),
        "weight_bytes": {},
        "disagree": [],
        "work": {},
        "starts": {},
    }
    if not args.resume or not args.json.exists():
        return report
    found = json.loads(args.json.read_text())
    for part, names in {"settings": KEPT, "environment": ("cpu", "versions")}.items():
        for name in names:
            if found[part][name] != report[part][name]:
                here, there = report[part][name], found[part][name]
                raise ValueError(f"{args.json} was measured with {name} {there}, not {here}: name another file")
    wrong = {label.rpartition(": ")[0] for label in found["disagree"]}
    report["work"] = {label: work for label, work in found["work"].items() if label not in wrong}
    return report | {name: found[name] for name in ("weight_bytes", "starts")}


def save(report: dict[str, Any], path: Path | None) -> None:
    if path:
        part = path.with_name(f"{path.name}.part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(part, path)


def text(report: dict[str, Any]) -> list[str]:
    env, settings = report["environment"], report["settings"]
    lines = [
        f"RWKV-4 {settings['shape']} (layers, channels, vocabulary: {SHAPES[settings['shape']]}), random weights",
        f"{env['cpu']}, {env['threads']} threads, load {env['load_average']:.1f}, {env['date']}",
        "   ".join(f"{name} {version}" for name, version in env["versions"].items()),
    ]
    if report["disagree"]:
        return [*lines, "", "Not the tokens that ours writes, so speed is not shown:", *report["disagree"]]
    row = "{:30}{:18}{:>9} {:>18}{:>9}{:>9}{:>9}{:>10}{:>10}"
    lines += ["", row.format("", "", "tokens/s", "(range)", "ceiling", "kernel", "ours x", "prompt s", "peak MiB")]
    for label, work in report["work"].items():
        ours = work["sides"][OURS]["tokens_per_second"]
        for name, side in work["sides"].items():
            peak = f"{work['peak_bytes'][name] / 2**20:.0f}" if "peak_bytes" in work else ""
            span = f"({side['slowest']:.1f} .. {side['fastest']:.1f})"
            kernel = f"{work['in_kernel']:.0%}" if name == OURS else ""
            cells = [f"{side['tokens_per_second']:.1f}", span, f"{side['share_of_ceiling']:.0%}", kernel]
            cells += [f"{ours / side['tokens_per_second']:.2f}", f"{side['first_token_seconds']:.3f}", peak]
            lines.append(row.format(label, name, *cells))
        size = report["weight_bytes"][work["dtype"]]
        span = "({:.1f} .. {:.1f})".format(*(work["batch"] / end(work["reading_seconds"]) for end in (max, min)))
        lines.append(row.format(label, READING, f"{work['ceiling']:.1f}", span, *[""] * 5))
        lines.append(row.format(label, "", "", f"{size * work['ceiling'] / work['batch'] / 1e9:.1f} GB/s", *[""] * 5))
    for dtype, starts in report["starts"].items():
        found = ", ".join(f"{median(speeds):.1f} after {start}" for start, speeds in starts.items())
        lines.append(f"{dtype}, ours, tokens/s: {found}")
    lines += ["", f"medians of {settings['repeats']}, sides by turns"]
    return [*lines, f"peak: {MEMORY}"] if settings["memory"] else lines


def plot(report: dict[str, Any], path: Path) -> None:
    """Tokens per second against position: of each dtype, the longest text of the smallest batch."""
    from matplotlib.figure import Figure

    found = report["work"].values()
    chosen = [
        min((w for w in found if w["dtype"] == dtype), key=lambda w: (w["batch"], -w["tokens"], w["prompt"]))
        for dtype in report["weight_bytes"]
    ]
    figure = Figure(figsize=(5 * len(chosen), 4), layout="constrained")
    for axes, work in zip(figure.subplots(1, len(chosen), squeeze=False)[0], chosen, strict=True):
        for name, side in work["sides"].items():
            speeds = side["speed_by_position"]
            positions = [work["prompt"] + work["tokens"] * (i + 0.5) / len(speeds) for i in range(len(speeds))]
            axes.plot(positions, speeds, label=name)
        axes.axhline(work["ceiling"], color="gray", linestyle="--", label=READING)
        axes.set(title=f"{work['dtype']}, batch {work['batch']}", xlabel="position", ylabel="tokens/s", ylim=(0, None))
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.peak_of:
        print(peak_of(Work(**json.loads(args.peak_of[0])), args.peak_of[1], args))
        return 0
    try:
        report = begin(args)
    except ValueError as error:
        print(f"generate.py: error: {error}", file=sys.stderr)
        return 2
    for dtype in args.dtypes:
        measure(dtype, args, report)
    print("\n".join(text(report)))
    save(report, args.json)
    if args.plot and not report["disagree"]:
        plot(report, args.plot)
    return 1 if report["disagree"] else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="169m")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, nargs="+", default=[16], help="tokens to read first")
    parser.add_argument("--tokens", type=int, nargs="+", default=[64], help="to write, three or more")
    parser.add_argument("--batches", type=int, nargs="+", default=[1])
    parser.add_argument("--starts", type=int, nargs="+", default=[], help="positions at which to compare speeds")
    parser.add_argument("--sides", choices=WRITERS, nargs="+", default=[name for name in WRITERS if name != AT_ONCE])
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
    parser.add_argument("--reads", type=int, default=10, help="of the weights, in each repeat")
    parser.add_argument("--memory", action="store_true", help="also measure peaks, each in a process of its own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--resume", action="store_true", help="keep figures that --json names, and measure the others")
    parser.add_argument("--plot", type=Path, help="where to draw speed against position")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)  # the process that measures one side's memory
    args = parser.parse_args()
    if OURS not in args.sides:
        parser.error(f"sides are {', '.join(args.sides)}: {OURS} is what the others are compared with")
    if min(args.tokens) < 3 or min([*args.prompts, *args.batches, args.repeats, args.reads, args.threads]) < 1:
        parser.error("give at least 3 tokens, and at least 1 of everything else")
    if args.resume and not args.json:
        parser.error("--resume keeps the figures of a file: name it by --json")
    return args


if __name__ == "__main__":
    sys.exit(main())
