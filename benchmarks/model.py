"""Speed and memory of whole RWKV-4 models on a CPU: this project, transformers' built-in one, the official package.

    python benchmarks/model.py                                   # the 169M shape, a few minutes on two cores
    python benchmarks/model.py --json model.json --plot model.png
    python benchmarks/model.py --shape tiny --tokens 64 --train-shape 2x32 --repeats 3      # seconds, to see it work

Every side holds the same random weights in float32 and does the same work: prefill (a batch of one, all logits, no
gradients) and training (forward with labels, then backward). First they must agree; if they do not, no speed is
measured and the exit code is 1. That comparison is also the warm-up.
"""

import argparse
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import GIVE_BACK, MEMORY, environment, interleaved, peak_memory, progress
from sides import SHAPES, SIDES
from torch import Tensor

JOBS = ("prefill", "train")


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    ids = token_ids(args)
    if args.peak_of:
        print(peak_of(*args.peak_of, args, ids))
        return 0
    report: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "plot", "peak_of")},
        "environment": environment(["modeling-rwkv", "torch", "transformers", "rwkv"]),
    }
    time_all(report, args, ids)
    if report["agree"]:
        report["memory"] = {job: {name: peak_alone(job, name) for name in report["seconds"][job]} for job in JOBS}
        report["times_ours"] = ratios(report)
    print(text(report, args))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot and report["agree"]:
        plot(report, args.plot)
    return 0 if report["agree"] else 1


def time_all(report: dict[str, Any], args: argparse.Namespace, ids: dict[str, Tensor]) -> None:
    """Load the sides, compare what they compute and, if that is the same, time them: into ``report``."""
    progress(f"loading {', '.join(SIDES)}")
    sides = {name: load(args.shape, args.seed) for name, load in SIDES.items()}
    calls = {
        job: {name: partial(getattr(side, job), ids[job]) for name, side in sides.items() if side.can(job)}
        for job in JOBS
    }
    progress("comparing what they compute")
    report["disagreement"] = {
        "prefill": differences(calls["prefill"], lambda a, b: float((a - b).abs().max())),
        "train": differences(calls["train"], gradient_difference),
    }
    worst = [difference for job in JOBS for difference in report["disagreement"][job].values()]
    report["agree"] = all(difference < args.tolerance for difference in worst)  # NaN does not agree
    if report["agree"]:
        report["seconds"] = {
            job: {name: seconds.summary() for name, seconds in interleaved(calls[job], args.repeats).items()}
            for job in JOBS
        }


def differences(calls: dict[str, Any], difference: Any) -> dict[str, float]:
    """Of what each other side computes from what the first one does."""
    (_, first), *others = calls.items()
    expected = first()
    return {name: difference(expected, call()) for name, call in others}


def gradient_difference(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float:
    """Largest difference of a parameter's gradients over the largest of these gradients; the worst parameter."""
    if expected.keys() != actual.keys():
        return float("inf")
    return max(float((actual[name] - g).abs().max() / g.abs().max()) for name, g in expected.items())


def peak_alone(job: str, side: str) -> int:
    """``peak_of`` in a process that has done nothing else."""
    progress(f"memory: {job}, {side}")
    command = [sys.executable, *sys.argv, "--peak-of", job, side]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=os.environ | GIVE_BACK)
    return int(done.stdout)


def peak_of(job: str, name: str, args: argparse.Namespace, ids: dict[str, Tensor]) -> int:
    side = SIDES[name](args.shape, args.seed)
    do = getattr(side, job)
    do(ids[job][:, :64])
    side.forget()
    return peak_memory(lambda: do(ids[job]))


def ratios(report: dict[str, Any]) -> dict[str, Any]:
    """What each side needs over what the first one needs: medians of time, peaks of memory."""
    result: dict[str, Any] = {}
    for job, sides in report["seconds"].items():
        first = next(iter(sides))
        result[job] = {
            name: {
                "wall": seconds["wall"]["median"] / sides[first]["wall"]["median"],
                "cpu": seconds["cpu"]["median"] / sides[first]["cpu"]["median"],
                "memory": report["memory"][job][name] / report["memory"][job][first],
            }
            for name, seconds in sides.items()
        }
    return result


def text(report: dict[str, Any], args: argparse.Namespace) -> str:
    env = report["environment"]
    lines = [
        f"RWKV-4 {args.shape} (layers, channels, vocabulary: {SHAPES[args.shape]}), float32, random weights",
        f"{env['cpu']}, {env['threads']} threads, load {env['load_average']:.1f}, {env['date']}",
        "   ".join(f"{name} {version}" for name, version in env["versions"].items()),
        "",
    ]
    for job, what in (("prefill", "logits, absolute"), ("train", "gradients, relative to each parameter's largest")):
        found = ", ".join(f"{name} {x:.1e}" for name, x in report["disagreement"][job].items())
        lines.append(f"difference from {next(iter(SIDES))} in {what}: {found} (allowed: {args.tolerance:.0e})")
    if not report["agree"]:
        return "\n".join([*lines, "", "The sides disagree: speed was not measured."])
    work = {"prefill": f"1x{args.tokens}", "train": "x".join(map(str, args.train_shape))}
    row = "{:18}{:10}{:>8}  {:16}{:>6}{:>10}{:>6}{:>10}{:>6}"
    lines += ["", row.format("", "", "wall s", "(min .. max)", "ratio", "CPU s", "ratio", "peak MiB", "ratio")]
    for job, sides in report["seconds"].items():
        for name, seconds in sides.items():
            wall, times = seconds["wall"], report["times_ours"][job][name]
            cells = [f"{job} {work[job]}", name, f"{wall['median']:.2f}", f"({wall['min']:.2f} .. {wall['max']:.2f})"]
            cells += [f"{times['wall']:.2f}", f"{seconds['cpu']['median']:.2f}", f"{times['cpu']:.2f}"]
            cells += [f"{report['memory'][job][name] / 2**20:.0f}", f"{times['memory']:.2f}"]
            lines.append(row.format(*cells))
    lines += ["", f"time: medians of {args.repeats}, sides by turns; CPU time is that of all threads"]
    return "\n".join([*lines, f"peak: {MEMORY}", f"ratio: this side / {next(iter(SIDES))}; above 1, it needs more"])


def plot(report: dict[str, Any], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(2, len(JOBS), figsize=(8, 5), layout="constrained")
    for (time, memory), job in zip(axes.T, JOBS, strict=True):
        for name, seconds in report["seconds"][job].items():
            wall = seconds["wall"]
            spread = [[wall["median"] - wall["min"]], [wall["max"] - wall["median"]]]
            time.bar_label(time.bar(name, wall["median"], yerr=spread, capsize=4), fmt="%.2f", label_type="center")
            memory.bar_label(memory.bar(name, report["memory"][job][name] / 2**20), fmt="%.0f", label_type="center")
        time.set(title=job, ylabel="seconds, median and range")
        memory.set(ylabel="peak MiB above the weights")
    figure.savefig(path, dpi=150)


def token_ids(args: argparse.Namespace) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(args.seed)
    shapes = {"prefill": (1, args.tokens), "train": args.train_shape}
    return {job: torch.randint(SHAPES[args.shape][-1], shapes[job], generator=generator) for job in JOBS}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="169m")
    parser.add_argument("--tokens", type=int, default=1024, help="of the prefill")
    parser.add_argument("--train-shape", type=rows_by_tokens, default=(2, 512), metavar="ROWSxTOKENS")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="how far sides may differ; 0 is always missed")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)  # the process that measures one side's memory
    return parser.parse_args()


def rows_by_tokens(text: str) -> tuple[int, int]:
    rows, tokens = map(int, text.split("x"))
    return rows, tokens


if __name__ == "__main__":
    sys.exit(main())
