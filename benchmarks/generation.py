"""Time and memory of generating N tokens: RWKV beside a Transformer of the same shape with its KV cache.

    python benchmarks/generation.py                                # a small shape, minutes on one core
    python benchmarks/generation.py --json generation.json --plot generation.png
    python benchmarks/generation.py --shape 169m --threads 16      # any of sides.py, or LAYERSxWIDTHxVOCABULARY
    python benchmarks/generation.py --shape 430m --device cuda --dtype bfloat16
    python benchmarks/generation.py --shape tiny --tokens 8 16     # to see it work

A figure like the paper's on generation (Peng et al. 2023, arXiv:2305.13048, section 6). Both are transformers' own
`generate`, one row, the likeliest token each time, from random weights: ours, and GPT-NeoX with the KV cache that it
uses by itself. Sides write by turns; clocks are read as tokens come, so that one run has the times of every N. On a
CPU the figure shows CPU time, of all threads, which other programs disturb less than wall time. The peak is counted
from the loaded model: on a GPU what PyTorch's allocator gave out, on a CPU see `MEMORY` in `measure.py`.

First each side, fed token by token with its cache, must give the logits of one pass over all of them; if not, nothing
is measured and the exit code is 1.
"""

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from measure import GIVE_BACK, Seconds, environment, peak_memory, progress, turns
from sides import SHAPES, SIDES
from torch import Tensor, nn
from transformers.generation.streamers import BaseStreamer

OURS, PEER = "ours", "GPT-NeoX"
CHECKED = 48  # tokens
# Of the norm of logits: sums in another order in float32; in bfloat16, a few roundings of 2^-8.
TOLERANCE = {"float32": 1e-5, "bfloat16": 2**-5}


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    if args.peaks_of:
        print(json.dumps(peaks(load(args.peaks_of, args), args.tokens)))
        return 0
    models = {side: load(side, args) for side in (OURS, PEER)}
    report: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "plot", "peaks_of")},
        "environment": environment(["modeling-rwkv", "torch", "transformers"]),
        "disagreement": {side: disagreement(model) for side, model in models.items()},
    }
    if args.device == "cuda":
        report["environment"]["gpu"] = torch.cuda.get_device_name()
    report["agree"] = all(found <= args.tolerance for found in report["disagreement"].values())  # NaN does not agree
    if report["agree"]:
        report |= measured(models, args)
    print("\n".join(text(report)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot and report["agree"]:
        plot(report, args.plot)
    return 0 if report["agree"] else 1


def load(side: str, args: argparse.Namespace) -> nn.Module:
    model = SIDES[side].load(args.shape, args.seed, getattr(torch, args.dtype)).model.to(args.device).eval()
    # It writes on, and what it has written is not taken for padding when it is read again.
    model.generation_config.update(eos_token_id=None, pad_token_id=None)
    return model


@torch.inference_mode()
def disagreement(model: nn.Module) -> float:
    """The norm of how logits differ that come one by one and all at once, relative."""
    ids = torch.arange(CHECKED, device=model.device)[None] % model.config.vocab_size
    whole, cache, steps = model(input_ids=ids).logits, None, []
    for token in ids.T:
        output = model(input_ids=token[None], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    return float((torch.cat(steps, 1).float() - whole.float()).norm() / whole.float().norm())


class Clock(BaseStreamer):
    """Wall and CPU seconds since it was made when so many tokens have come; `generate` puts the prompt first."""

    def __init__(self, marks: list[int]) -> None:
        self.marks, self.tokens, self.seconds = marks, -1, dict[int, tuple[float, float]]()
        self.begin = time.perf_counter(), time.process_time()

    def put(self, value: Tensor) -> None:
        self.tokens += 1
        if self.tokens in self.marks:
            wall, cpu = self.begin
            self.seconds[self.tokens] = time.perf_counter() - wall, time.process_time() - cpu
            progress(f"{self.tokens:,} tokens after {self.seconds[self.tokens][0]:.1f} s")

    def end(self) -> None:
        """Nothing is left to show."""


class Writer:
    """One text that a model writes; its cache goes on from call to call."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.cache = model, None
        self.ids = torch.ones(1, 1, dtype=torch.long, device=model.device)

    def write(self, tokens: int, streamer: BaseStreamer | None = None) -> None:
        output = self.model.generate(
            self.ids,
            past_key_values=self.cache,
            max_new_tokens=tokens,
            do_sample=False,
            use_cache=True,
            return_dict_in_generate=True,
            streamer=streamer,
        )
        self.ids, self.cache = output.sequences, output.past_key_values


def measured(models: dict[str, nn.Module], args: argparse.Namespace) -> dict[str, Any]:
    """By side: seconds and peak bytes until each of the tokens, and how time grows."""
    for model in models.values():
        Writer(model).write(min(args.tokens))  # warm-up
    seconds = {side: {n: Seconds([], []) for n in args.tokens} for side in models}
    for side in turns(list(models), args.repeats):
        progress(f"timing {side}, {max(args.tokens):,} tokens")
        clock = Clock(args.tokens)
        Writer(models[side]).write(max(args.tokens), clock)
        for n, (wall, cpu) in clock.seconds.items():
            seconds[side][n].wall.append(wall)
            seconds[side][n].cpu.append(cpu)
    found = {side: {n: samples.summary() for n, samples in of.items()} for side, of in seconds.items()}
    return {
        "seconds": found,
        "growth": {side: growth({n: of[n][args.clock]["median"] for n in of}) for side, of in found.items()},
        "peak_bytes": {side: peaks_alone(side, models[side], args) for side in models},
    }


def growth(seconds: Mapping[int, float]) -> float:
    """The power of N that time grew by between the last two N: 1 where every token takes the same."""
    (few, less), (many, more) = sorted(seconds.items())[-2:]
    return math.log(more / less) / math.log(many / few)


def peaks_alone(side: str, model: nn.Module, args: argparse.Namespace) -> dict[int, int]:
    """`peaks`; on a CPU in a process that has done nothing else."""
    progress(f"memory: {side}")
    if args.device == "cuda":
        return peaks(model, args.tokens)
    command = [sys.executable, *sys.argv, "--peaks-of", side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | GIVE_BACK)
    return {int(n): peak for n, peak in json.loads(done.stdout).items()}


def peaks(model: nn.Module, marks: list[int]) -> dict[int, int]:
    """Peak bytes above those of the loaded, warm model until so many tokens are written."""
    in_use, rise = (torch.cuda.memory_allocated, allocated_peak) if model.device.type == "cuda" else (rss, peak_memory)
    Writer(model).write(min(marks))
    writer, before, found = Writer(model), in_use(), {0: 0}
    for done, mark in pairwise([0, *marks]):
        begin = in_use() - before
        found[mark] = max(found[done], begin + rise(partial(writer.write, mark - done)))
    return {mark: found[mark] for mark in marks}


def rss() -> int:
    import psutil

    return psutil.Process().memory_info().rss


def allocated_peak(job: Callable[[], object]) -> int:
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    return torch.cuda.max_memory_allocated() - before


def text(report: dict[str, Any]) -> list[str]:
    env, settings = report["environment"], report["settings"]
    lines = [
        f"{settings['shape']} (layers, channels, vocabulary: {SHAPES[settings['shape']]}), {settings['dtype']}",
        f"{env.get('gpu', env['cpu'])}, {env['threads']} threads, load {env['load_average']:.1f}, {env['date']}",
        "   ".join(f"{name} {version}" for name, version in env["versions"].items()),
        "",
        "token by token beside all at once: "
        + ", ".join(f"{side} {found:.1e}" for side, found in report["disagreement"].items())
        + f" (allowed: {settings['tolerance']:.1e})",
    ]
    if not report["agree"]:
        return [*lines, "", "They disagree: nothing was measured."]
    row = "{:>8}  {:10}{:>10}{:>10}{:>12}"
    lines += ["", row.format("tokens", "", "wall s", "CPU s", "peak MiB")]
    for n in settings["tokens"]:
        for side, seconds in report["seconds"].items():
            cells = [f"{seconds[n][clock]['median']:.2f}" for clock in ("wall", "cpu")]
            lines.append(row.format(n, side, *cells, f"{report['peak_bytes'][side][n] / 2**20:.2f}"))
    powers = ", ".join(f"{side} N^{power:.2f}" for side, power in report["growth"].items())
    note = f"time: medians of {settings['repeats']}, by turns; at the end {settings['clock']} time grew as {powers}"
    return [*lines, "", note]


def plot(report: dict[str, Any], path: Path) -> None:
    """Time and peak memory against tokens."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    tokens, settings = report["settings"]["tokens"], report["settings"]
    for side in (OURS, PEER):
        seconds = [report["seconds"][side][n][settings["clock"]] for n in tokens]
        middle = [of["median"] for of in seconds]
        spread = [[of["median"] - of["min"] for of in seconds], [of["max"] - of["median"] for of in seconds]]
        left.errorbar(tokens, middle, spread, marker="o", capsize=3, label=side)
        right.plot(tokens, [report["peak_bytes"][side][n] / 2**20 for n in tokens], marker="o", label=side)
    left.set(ylabel={"wall": "seconds", "cpu": "CPU seconds"}[settings["clock"]] + " (range)")
    right.set(ylabel="peak memory above the model, MiB")
    for axes in (left, right):
        axes.set(xlabel="tokens generated", xlim=(0, None), ylim=(0, None))
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.grid(alpha=0.3)
    left.legend()
    env = report["environment"]
    figure.suptitle(f"{SHAPES[settings['shape']]}, {settings['dtype']}, {env.get('gpu', env['cpu'])}", fontsize=10)
    figure.savefig(path, dpi=90)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", type=shape, default="2x64x4096", metavar="NAME", help=f"{', '.join(SHAPES)} or LxCxV"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048, 4096, 8192, 12288, 16384])
    parser.add_argument("--repeats", type=int, default=1, help="of the times")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=TOLERANCE, default="float32")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights")
    parser.add_argument(
        "--tolerance", type=float, help="default: 1e-5 in float32, 2^-5 in bfloat16; 0 is always missed"
    )
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    parser.add_argument("--peaks-of", help=argparse.SUPPRESS)  # the process that measures one side's memory
    args = parser.parse_args()
    if sorted({*args.tokens}) != args.tokens or len(args.tokens) < 2 or args.tokens[0] < 1:
        parser.error(f"tokens are {args.tokens}; give two or more that rise, from 1 on")
    if args.repeats < 1:
        parser.error(f"repeats is {args.repeats}; it must be at least 1")
    if SHAPES[args.shape][1] % 64:
        parser.error(f"shape {args.shape} is {SHAPES[args.shape][1]} wide; heads of {PEER} need a multiple of 64")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("device is cuda, but there is no GPU that PyTorch can use; leave it out")
    args.clock = "wall" if args.device == "cuda" else "cpu"
    args.tolerance = TOLERANCE[args.dtype] if args.tolerance is None else args.tolerance
    return args


def shape(text: str) -> str:
    """A name of sides.py; LAYERSxWIDTHxVOCABULARY becomes one."""
    if text not in SHAPES:
        layers, width, vocabulary = map(int, text.split("x"))
        if min(layers, width, vocabulary) < 1:
            raise ValueError(text)
        SHAPES[text] = layers, width, vocabulary
    return text


if __name__ == "__main__":
    sys.exit(main())
