"""Speed and memory of whole models on a CPU: this project, its peers, and a Transformer of the same shape.

    python benchmarks/model.py                                   # the 169M shape, under ten minutes on two cores
    python benchmarks/model.py --json model.json --plot model.png
    python benchmarks/model.py --dtypes bfloat16 --tokens 1024 --memory
    python benchmarks/model.py --shape tiny --tokens 32 64 --train-shape 2x32 --seconds 0     # to see it work

Sides (`sides.py`): ours; ours without WKV, which shows what the operator costs; the model built into transformers; the
official `rwkv` package; GPT-NeoX. All do the same work: prefill (a batch of one, all logits, no gradients) at every
length and dtype, and training (forward with labels, then backward) in float32.

First the RWKV-4 sides, which hold the same random weights, must agree with ours in float32, and the others must give
finite numbers; if not, no speed is measured and the exit code is 1. That comparison is also the warm-up. In float32
logits may differ by 1e-4. In bfloat16 a rounding errs by at most half of epsilon = 2^-7, and L layers add 2 L rounded
terms to the residual stream; errors that do not know of each other add up to less than epsilon sqrt(L), relative to
the norm of the logits. That is 3% at 12 layers, where leaving WKV out makes 80%.

In some virtual machines every first touch of memory is slow, and logits are large: where the range of the times is
wide, let glibc keep what is freed (not with --memory)::

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=17179869184 MALLOC_TOP_PAD_=268435456 python benchmarks/model.py
"""

import argparse
import json
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import MEMORY, alone, environment, interleaved, peak_memory, progress
from sides import SHAPES, SIDES
from torch import Tensor

OURS, WITHOUT_WKV = "ours", "ours without WKV"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class Work:
    """One job at one shape and dtype: all sides that can do it are timed by turns."""

    job: str
    dtype: str
    rows: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.job} {self.dtype} {self.rows}x{self.tokens}"


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    works = {str(work): work for work in all_works(args)}
    if args.peak_of:
        label, side = args.peak_of
        print(peak_of(works[label], side, args))
        return 0
    report: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "plot", "peak_of")},
        "environment": environment(["modeling-rwkv", "torch", "transformers", "rwkv"]),
        "work": {label: vars(work) for label, work in works.items()},
    }
    compare_and_time(report, list(works.values()), args)
    if report["agree"] and args.memory:
        report["memory"] = {
            label: {name: int(alone("--peak-of", label, name)) for name in sides}
            for label, sides in report["seconds"].items()
        }
    if report["agree"]:
        report["times_ours"] = ratios(report)
    print(text(report, args))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot and report["agree"]:
        plot(report, args.plot)
    return 0 if report["agree"] else 1


def all_works(args: argparse.Namespace) -> list[Work]:
    prefill = [Work("prefill", dtype, 1, tokens) for dtype in args.dtypes for tokens in args.tokens]
    return [*prefill, Work("train", "float32", *args.train_shape)] if "float32" in args.dtypes else prefill


def compare_and_time(report: dict[str, Any], works: list[Work], args: argparse.Namespace) -> None:
    """Load the sides, compare what they compute and, if that is the same, time them: into ``report``."""
    sides = {
        dtype: {name: side.load(args.shape, args.seed, DTYPES[dtype]) for name, side in SIDES.items()}
        for dtype in announced("loading", args.dtypes)
    }
    if "float32" in sides:
        exact = sides["float32"][OURS]
    else:
        exact = SIDES[OURS].load(args.shape, args.seed, torch.float32)
    calls: dict[Work, dict[str, Callable[[], Any]]] = {
        work: {
            name: partial(getattr(side, work.job), token_ids(work, args))
            for name, side in sides[work.dtype].items()
            if side.can(work.job)
        }
        for work in works
    }
    report["disagreement"], report["not_finite"] = {}, []
    for work in announced("comparing", works):
        expected = getattr(exact, work.job)(token_ids(work, args))
        report["disagreement"][str(work)] = {}
        for name, call in calls[work].items():
            actual = call()
            if SIDES[name].same_function:
                report["disagreement"][str(work)][name] = difference(work, expected, actual)
            elif not finite(actual):
                report["not_finite"].append(f"{work}, {name}")
    report["allowed"] = {str(work): tolerance(work, args) for work in works}
    report["agree"] = not report["not_finite"] and all(
        found <= report["allowed"][label]  # NaN does not agree
        for label, found_of in report["disagreement"].items()
        for found in found_of.values()
    )
    if report["agree"]:
        report["seconds"] = {
            str(work): {
                name: seconds.summary()
                for name, seconds in interleaved(calls[work], args.repeats, args.seconds).items()
            }
            for work in announced("timing", works)
        }


def announced(what: str, items: list[Any]) -> Any:
    for item in items:
        progress(f"{what} {item}")
        yield item


def difference(work: Work, expected: Any, actual: Any) -> float:
    """Of logits, the largest in float32 and the norm, relative, in bfloat16; or ``gradient_difference``."""
    if work.job == "train":
        return gradient_difference(expected, actual)
    error = actual.float() - expected
    return float(error.abs().max() if work.dtype == "float32" else error.norm() / expected.norm())


def gradient_difference(expected: dict[str, Tensor], actual: dict[str, Tensor]) -> float:
    """Largest difference of a parameter's gradients over the largest of these gradients; the worst parameter."""
    if expected.keys() != actual.keys():
        return float("inf")
    return max(float((actual[name] - g).abs().max() / g.abs().max()) for name, g in expected.items())


def finite(result: Any) -> bool:
    tensors = result.values() if isinstance(result, dict) else [result]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def tolerance(work: Work, args: argparse.Namespace) -> float:
    if work.dtype == "float32":
        return args.tolerance
    return args.tolerance_in_epsilons * torch.finfo(DTYPES[work.dtype]).eps * math.sqrt(SHAPES[args.shape][0])


def token_ids(work: Work, args: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(SHAPES[args.shape][-1], (work.rows, work.tokens), generator=generator)


def peak_of(work: Work, name: str, args: argparse.Namespace) -> int:
    side = SIDES[name].load(args.shape, args.seed, DTYPES[work.dtype])
    do, ids = getattr(side, work.job), token_ids(work, args)
    do(ids[:, :64])
    side.forget()
    return peak_memory(lambda: do(ids))


def ratios(report: dict[str, Any]) -> dict[str, Any]:
    """What each side needs over what ours needs: medians of time, peaks of memory."""
    result: dict[str, Any] = {}
    for label, sides in report["seconds"].items():
        result[label] = {
            name: {clock: seconds[clock]["median"] / sides[OURS][clock]["median"] for clock in ("wall", "cpu")}
            for name, seconds in sides.items()
        }
        for name, peak in report.get("memory", {}).get(label, {}).items():
            result[label][name]["memory"] = peak / max(1, report["memory"][label][OURS])
    return result


def text(report: dict[str, Any], args: argparse.Namespace) -> str:
    env = report["environment"]
    lines = [
        f"RWKV-4 {args.shape} (layers, channels, vocabulary: {SHAPES[args.shape]}), random weights",
        f"{env['cpu']}, {env['threads']} threads, load {env['load_average']:.1f}, {env['date']}",
        "   ".join(f"{name} {version}" for name, version in env["versions"].items()),
        "",
        "difference from ours in float32: logits' largest (float32) or norm, relative (bfloat16); "
        "gradients, relative to each parameter's largest",
    ]
    for label, found in report["disagreement"].items():
        cells = ", ".join(f"{name} {x:.1e}" for name, x in found.items())
        lines.append(f"  {label:24}{cells} (allowed: {report['allowed'][label]:.1e})")
    lines += [f"  not finite: {name}" for name in report["not_finite"]]
    if not report["agree"]:
        return "\n".join([*lines, "", "The sides disagree: speed was not measured."])
    return "\n".join([*lines, "", *table(report), *footnotes(report), "", wkv_cost(report)])


def table(report: dict[str, Any]) -> list[str]:
    row = "{:24}{:18}{:>8} {:>20}{:>8}{:>9}{:>8}"
    head = ["", "", "wall s", "(min .. max)", "x ours", "CPU s", "x ours"]
    if "memory" in report:
        row, head = row + "{:>10}{:>8}", [*head, "peak MiB", "x ours"]
    lines = [row.format(*head)]
    for label, sides in report["seconds"].items():
        for name, seconds in sides.items():
            wall, times = seconds["wall"], report["times_ours"][label][name]
            cells = [label, name, f"{wall['median']:.3f}", f"({wall['min']:.3f} .. {wall['max']:.3f})"]
            cells += [f"{times['wall']:.2f}", f"{seconds['cpu']['median']:.3f}", f"{times['cpu']:.2f}"]
            if "memory" in report:
                cells += [f"{report['memory'][label][name] / 2**20:.0f}", f"{times['memory']:.2f}"]
            lines.append(row.format(*cells))
    return lines


def footnotes(report: dict[str, Any]) -> list[str]:
    turns = {len(seconds["wall"]["samples"]) for sides in report["seconds"].values() for seconds in sides.values()}
    lines = ["", f"time: medians of {min(turns)} to {max(turns)}, sides by turns; CPU time is that of all threads"]
    lines.append("x ours: this side / ours; above 1, it needs more")
    return [*lines, f"peak: {MEMORY}"] if "memory" in report else lines


def wkv_cost(report: dict[str, Any]) -> str:
    """The closing line: 1.00 where the operator is no longer seen."""
    cells = [f"{label} {1 / times[WITHOUT_WKV]['wall']:.3f}" for label, times in report["times_ours"].items()]
    return "ours / ours without WKV: " + ", ".join(cells)


def plot(report: dict[str, Any], path: Path) -> None:
    """Tokens per second, one panel for each job and dtype, bars grouped by length."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels: dict[str, list[str]] = {}
    for label, work in report["work"].items():
        panels.setdefault(f"{work['job']}, {work['dtype']}", []).append(label)
    widths = [len(labels) + 0.5 for labels in panels.values()]
    figure, axes = pyplot.subplots(
        1, len(panels), figsize=(2 + 1.8 * sum(widths), 4.5), width_ratios=widths, layout="constrained", squeeze=False
    )
    for axis, (title, labels) in zip(axes[0], panels.items(), strict=True):
        draw(axis, report, labels)
        axis.set(title=title, ylabel="tokens per second, median and range")
    figure.legend(*axes[0][0].get_legend_handles_labels(), loc="outside lower center", ncols=len(SIDES))
    figure.savefig(path, dpi=150)


def draw(axis: Any, report: dict[str, Any], labels: list[str]) -> None:
    width = 0.8 / len(SIDES)
    for i, name in enumerate(SIDES):
        drawn = [(x, label) for x, label in enumerate(labels) if name in report["seconds"][label]]
        speeds = []
        for _, label in drawn:
            work, wall = report["work"][label], report["seconds"][label][name]["wall"]
            speeds.append([work["rows"] * work["tokens"] / wall[key] for key in ("median", "max", "min")])
        middle = [median for median, _, _ in speeds]
        spread = [[m - low for m, low, _ in speeds], [high - m for m, _, high in speeds]]
        axis.bar([x + i * width for x, _ in drawn], middle, width, yerr=spread, capsize=2, label=name, color=f"C{i}")
    shapes = ["{rows}x{tokens}".format(**report["work"][label]) for label in labels]
    axis.set_xticks([x + 0.4 - width / 2 for x in range(len(labels))], shapes)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="169m")
    parser.add_argument("--tokens", type=int, nargs="+", default=[256, 1024, 4096], help="of the prefills")
    parser.add_argument("--dtypes", choices=DTYPES, nargs="+", default=list(DTYPES), help="of the prefills")
    parser.add_argument("--train-shape", type=rows_by_tokens, default=(2, 512), metavar="ROWSxTOKENS")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement, at least")
    parser.add_argument("--seconds", type=float, default=15, help="repeat up to four times as often within so many")
    parser.add_argument("--memory", action="store_true", help="also measure peaks, each in a process of its own")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--tolerance", type=float, default=1e-4, help="in float32; 0 is always missed")
    parser.add_argument("--tolerance-in-epsilons", type=float, default=1.0, help="in bfloat16, times sqrt(layers)")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)  # the process that measures one side's memory
    return parser.parse_args()


def rows_by_tokens(text: str) -> tuple[int, int]:
    rows, tokens = map(int, text.split("x"))
    return rows, tokens


if __name__ == "__main__":
    sys.exit(main())
