"""Loss against training compute: models of several sizes trained on the same text, and the power law through them.

    # the text once, five sizes: minutes on one core for 3 MB
    python benchmarks/scaling.py --train_file train.txt --validation_file valid.txt --output_dir runs/scaling \
        --json scaling.json --plot scaling.png

    # larger ones; what is no option here is one of rwkv_finetune.pretrain
    python benchmarks/scaling.py --sizes 6x256 8x384 12x512 12x768 24x1024 --vocab_size 16384 --block_size 1024 \
        --per_device_train_batch_size 32 --learning_rate 1e-3 --bf16 true --train_file ...

A figure like the paper's on scaling laws (Peng et al. 2023, arXiv:2305.13048, section 4). Every size, LAYERSxWIDTH,
has a run of its own in output_dir, all with the same rows in the same order. The same command started again continues:
what is trained is only measured again, and a folder that was started with other options is refused.

Compute counts the products of matrices, which are nearly all: 6 for each weight and token, 2 forwards and 4 backwards;
embeddings are looked up, not multiplied. The loss is that of the validation text, in nats per token. The law,
loss = a * compute^-b, is the least-squares line through the logarithms of the last points, one of each size: those
before are of learning rates that have not come down yet.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measure import environment, progress
from torch import nn
from transformers import AutoModelForCausalLM

from rwkv_finetune import pretrain
from rwkv_finetune.arguments import read_yaml
from rwkv_finetune.report import curves

SIZES = ["1x32", "2x48", "2x80", "3x96", "4x128"]
RECIPE = Path(__file__).with_suffix(".yaml")
OURS = {"num_hidden_layers", "hidden_size"}  # which --sizes decides


@dataclass(frozen=True)
class PowerLaw:
    """loss = coefficient * compute^exponent, and the r^2 of its logarithm."""

    coefficient: float
    exponent: float
    r2: float

    def __call__(self, compute: float) -> float:
        return self.coefficient * compute**self.exponent


def main() -> None:
    args, given = arguments()
    torch.set_num_threads(args.threads)
    sizes = {}
    for layers, width in args.sizes:
        name = f"{layers}x{width}"
        folder = args.output_dir / name
        progress(f"training {name}")
        shape = [f"--num_hidden_layers={layers}", f"--hidden_size={width}"]
        pretrain.main([f"--config={args.config}", *given, *shape, f"--output_dir={folder}"])
        sizes[name] = outcome(folder)
    report: dict[str, Any] = {
        "settings": {"sizes": list(sizes), "config": read_yaml(args.config), "options": given},
        "environment": environment(["modeling-rwkv", "torch", "transformers"]),
        "sizes": sizes,
        "law": asdict(power_law([found["points"][-1] for found in sizes.values()])),
    }
    print("\n".join(text(report)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(report, args.plot)


def outcome(folder: Path) -> dict[str, Any]:
    """Of a finished run: weights, tokens, and points (compute, validation loss), the last of the final weights."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    each, losses = compute_of_a_token(model), curves(history)["validation"]
    return {
        "parameters": sum(x.numel() for x in model.parameters()),
        "compute_of_a_token": each,
        "tokens": round(losses[-1][0] * 1e6),
        "points": [(millions * 1e6 * each, loss) for millions, loss in losses if millions],
    }


def compute_of_a_token(model: nn.Module) -> int:
    """Floating point operations of matrices in a training step, for each token."""
    return 6 * sum(module.weight.numel() for module in model.modules() if isinstance(module, nn.Linear))


def power_law(points: Sequence[tuple[float, float]]) -> PowerLaw:
    """The law through points (compute, loss), by least squares of logarithms."""
    x, y = np.log(np.array(points)).T
    slope, intercept = np.polyfit(x, y, 1)
    return PowerLaw(float(np.exp(intercept)), float(slope), float(np.corrcoef(x, y)[0, 1] ** 2))


def text(report: dict[str, Any]) -> list[str]:
    env, law = report["environment"], report["law"]
    row = "{:10}{:>12}{:>12}{:>12}{:>10}"
    lines = [f"{env['cpu']}, {env['threads']} threads, {env['date']}", ""]
    lines.append(row.format("size", "parameters", "tokens", "compute", "loss"))
    for name, found in report["sizes"].items():
        compute, loss = found["points"][-1]
        cells = [f"{found['parameters']:,}", f"{found['tokens']:,}", f"{compute:.3g}", f"{loss:.4f}"]
        lines.append(row.format(name, *cells))
    return [*lines, "", f"loss = {law['coefficient']:.4g} * compute^{law['exponent']:.4f}, r^2 {law['r2']:.4f}"]


def plot(report: dict[str, Any], path: Path) -> None:
    """Loss against compute, both logarithmic, each size on its way, and the law."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, ScalarFormatter

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes, law = figure.subplots(), PowerLaw(**report["law"])
    for i, (name, found) in enumerate(report["sizes"].items()):
        compute, loss = zip(*found["points"], strict=True)
        axes.plot(compute, loss, color=f"C{i}", alpha=0.4)
        axes.plot(compute[-1], loss[-1], "o", color=f"C{i}", label=f"{name}, {found['parameters']:,} parameters")
    ends = [found["points"][-1][0] for found in report["sizes"].values()]
    line = np.array([min(ends) / 1.5, max(ends) * 1.5])
    axes.plot(line, law(line), "k--", label=f"compute^{law.exponent:.3f}, r^2 = {law.r2:.4f}")
    axes.set(xscale="log", yscale="log", xlabel="training compute (FLOP)", ylabel="validation loss (nats per token)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_major_formatter(ScalarFormatter())
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def arguments() -> tuple[argparse.Namespace, list[str]]:
    """The options of this program, and those of `rwkv_finetune.pretrain`."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--output_dir", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--sizes", type=size, nargs="+", default=[*map(size, SIZES)], metavar="LAYERSxWIDTH")
    parser.add_argument("--config", type=Path, default=RECIPE, help="of rwkv_finetune.pretrain [default: %(default)s]")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    args, given = parser.parse_known_args()
    if len({*args.sizes}) < 3 or len({*args.sizes}) < len(args.sizes):
        parser.error("sizes must be three or more different ones: through fewer points every line fits")
    if clash := OURS & {word.removeprefix("--").partition("=")[0] for word in given}:
        parser.error(f"{', '.join(sorted(clash))} cannot be given: --sizes says how large the models are")
    return args, given


def size(text: str) -> tuple[int, int]:
    """LAYERSxWIDTH, both at least 1."""
    layers, width = map(int, text.split("x"))
    if layers < 1 or width < 1:
        raise ValueError(text)
    return layers, width


if __name__ == "__main__":
    sys.exit(main())
