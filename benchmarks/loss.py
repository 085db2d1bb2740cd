"""Memory and time of a training step: with all logits at once, with the loss in chunks, and reading in chunks.

    python benchmarks/loss.py                                    # on the GPU if there is one; minutes on a CPU
    python benchmarks/loss.py --json loss.json --plot loss.png
    python benchmarks/loss.py --keep-activations                 # of every block, and not only its input
    python benchmarks/loss.py --shape tiny --tokens 64 128 --repeats 2 --device cpu       # to see it work

A step is one forward pass with labels and one backward pass over one row of so many tokens, every one of which counts;
`skip_logits=True`, or `chunk_length=1024`, is the only difference. Activations of blocks are checkpointed, as where
memory is short, or are kept, and then weigh more beside the logits. On a GPU matrices are multiplied in bfloat16 under
autocast, as by the Trainer with `--bf16`; on a CPU all is float32. The peak is counted from the loaded model, so
gradients are in it and weights are not: on a GPU what PyTorch's allocator gave out, on a CPU see `MEMORY` in
`measure.py`.

First losses and gradients must agree, each parameter's relative to its largest; if not, nothing is measured and the
exit code is 1.
"""

import argparse
import contextlib
import json
import sys
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import MEMORY, alone, environment, interleaved, interleaved_on_gpu, peak_memory, progress
from model import gradient_difference
from sides import SHAPES, ours
from torch import Tensor, nn

WAYS: dict[str, dict[str, Any]] = {
    "whole": {},
    "in chunks": {"skip_logits": True},
    "read in chunks": {"chunk_length": 1024},
}
TOLERANCE = {"cpu": 1e-5, "cuda": 2**-6}  # sums in another order in float32; two roundings to bfloat16
ALLOCATED = "what PyTorch's allocator gave out above what it had given out before, model loaded and warm"


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    model = load(args)
    if args.peak_of:
        print(resident_peak(model, args))
        return 0
    report: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "plot", "peak_of")},
        "environment": environment(["modeling-rwkv", "torch", "transformers"]),
        "disagreement": {tokens: disagreement(model, tokens, args) for tokens in args.tokens},
    }
    if args.device == "cuda":
        report["environment"]["gpu"] = torch.cuda.get_device_name()
    report["agree"] = all(found <= args.tolerance for found in report["disagreement"].values())  # NaN does not agree
    if report["agree"]:
        report["tokens"] = {tokens: measured(model, tokens, args) for tokens in args.tokens}
    print(text(report, args))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot and report["agree"]:
        plot(report, args.plot)
    return 0 if report["agree"] else 1


def load(args: argparse.Namespace) -> nn.Module:
    model = ours(args.shape, args.seed, torch.float32).model.to(args.device).train()
    if not args.keep_activations:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def step(model: nn.Module, ids: Tensor, way: str) -> Tensor:
    """Forward and backward; returns the loss."""
    model.zero_grad(set_to_none=True)
    autocast = torch.autocast("cuda", torch.bfloat16) if ids.is_cuda else contextlib.nullcontext()
    with autocast:
        loss = model(input_ids=ids, labels=ids, **WAYS[way]).loss
    loss.backward()
    return loss.detach()


def token_ids(tokens: int, args: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(SHAPES[args.shape][-1], (1, tokens), generator=generator).to(args.device)


def disagreement(model: nn.Module, tokens: int, args: argparse.Namespace) -> float:
    """The largest relative difference of the loss or any gradient."""
    progress(f"comparing at {tokens} tokens")
    found = []
    for way in WAYS:
        loss = step(model, token_ids(tokens, args), way)
        found.append({"loss": loss} | {name: parameter.grad for name, parameter in model.named_parameters()})
    return max(gradient_difference(found[0], other) for other in found[1:])


def measured(model: nn.Module, tokens: int, args: argparse.Namespace) -> dict[str, Any]:
    """Seconds and peak bytes of each way."""
    progress(f"timing {tokens} tokens")
    jobs = {way: partial(step, model, token_ids(tokens, args), way) for way in WAYS}
    if args.device == "cuda":
        seconds = interleaved_on_gpu(jobs, args.repeats)
        peaks = {way: allocated_peak(model, job) for way, job in jobs.items()}
    else:
        seconds = {way: of.wall for way, of in interleaved(jobs, args.repeats).items()}
        model.zero_grad(set_to_none=True)
        peaks = {way: int(alone("--peak-of", way, str(tokens))) for way in WAYS}
    return {
        "seconds": {way: {"median": median(of), "min": min(of), "max": max(of)} for way, of in seconds.items()},
        "peak_bytes": peaks,
        "peak_whole_over": {way: peaks["whole"] / max(1, peak) for way, peak in peaks.items()},
    }


def allocated_peak(model: nn.Module, job: partial[Tensor]) -> int:
    model.zero_grad(set_to_none=True)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    job()
    return torch.cuda.max_memory_allocated() - before


def resident_peak(model: nn.Module, args: argparse.Namespace) -> int:
    way, tokens = args.peak_of
    step(model, token_ids(64, args), way)
    model.zero_grad(set_to_none=True)
    return peak_memory(partial(step, model, token_ids(int(tokens), args), way))


def text(report: dict[str, Any], args: argparse.Namespace) -> str:
    env = report["environment"]
    blocks = "kept" if args.keep_activations else "checkpointed"
    lines = [
        f"RWKV-4 {args.shape} (layers, channels, vocabulary: {SHAPES[args.shape]}), activations {blocks}",
        f"{env.get('gpu', env['cpu'])}, load {env['load_average']:.1f}, {env['date']}",
        "   ".join(f"{name} {version}" for name, version in env["versions"].items()),
        "",
        "difference of loss and gradients, relative to each parameter's largest: "
        + ", ".join(f"{tokens} tokens {found:.1e}" for tokens, found in report["disagreement"].items())
        + f" (allowed: {args.tolerance:.1e})",
    ]
    if not report["agree"]:
        return "\n".join([*lines, "", "They disagree: nothing was measured."])
    row = "{:>8}  {:16}{:>10}{:>22}{:>12}{:>8}"
    lines += ["", row.format("tokens", "way", "seconds", "(min .. max)", "peak MiB", "less")]
    for tokens, found in report["tokens"].items():
        for way, seconds in found["seconds"].items():
            cells = [f"{seconds['median']:.3f}", f"({seconds['min']:.3f} .. {seconds['max']:.3f})"]
            less = f"{found['peak_whole_over'][way]:.2f}x"
            lines.append(row.format(tokens, way, *cells, f"{found['peak_bytes'][way] / 2**20:.0f}", less))
    return "\n".join([*lines, "", f"time: medians of {args.repeats}, by turns; peak: {peak_is(args.device)}"])


def peak_is(device: str) -> str:
    return ALLOCATED if device == "cuda" else MEMORY


def plot(report: dict[str, Any], path: Path) -> None:
    """Peak memory and time against tokens."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
    tokens = list(report["tokens"])
    for i, way in enumerate(WAYS):
        found = report["tokens"].values()
        seconds = [of["seconds"][way] for of in found]
        middle = [of["median"] for of in seconds]
        spread = [[of["median"] - of["min"] for of in seconds], [of["max"] - of["median"] for of in seconds]]
        style = {"marker": "o", "color": f"C{i}", "label": way}
        axes[0].plot(tokens, [of["peak_bytes"][way] / 2**30 for of in found], **style)
        axes[1].errorbar(tokens, middle, spread, capsize=3, **style)
    for axis, label in zip(axes, ("peak memory, GiB", "forward and backward, seconds (range)"), strict=True):
        axis.set(xlabel="tokens in a batch", ylabel=label, xticks=tokens, ylim=(0, 1.05 * axis.get_ylim()[1]))
    axes[0].legend()
    env, settings = report["environment"], report["settings"]
    figure.suptitle(f"{settings['shape']} {SHAPES[settings['shape']]}, {env.get('gpu', env['cpu'])}")
    figure.savefig(path, dpi=150)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="world-0.1b")
    parser.add_argument("--tokens", type=int, nargs="+", default=[2048, 8192])
    parser.add_argument("--device", choices=TOLERANCE, help="default: cuda if there is a GPU")
    parser.add_argument("--keep-activations", action="store_true", help="do not checkpoint the blocks")
    parser.add_argument("--repeats", type=int, default=3, help="of each time")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights and tokens")
    parser.add_argument("--tolerance", type=float, help="default: 1e-5 on a CPU, 2^-6 on a GPU; 0 is always missed")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    parser.add_argument("--peak-of", nargs=2, help=argparse.SUPPRESS)  # the process that measures one way's memory
    args = parser.parse_args()
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    args.tolerance = TOLERANCE[args.device] if args.tolerance is None else args.tolerance
    return args


if __name__ == "__main__":
    sys.exit(main())
