"""What quantized weights cost and save: bits a weight, size on disk, peak memory, speed, bits per byte.

    python benchmarks/quantization.py --file valid.txt             # minutes on one core
    python benchmarks/quantization.py --file valid.txt --json quantization.json --plot quantization.png
    python benchmarks/quantization.py --file valid.txt --device cuda --shape 1b5
    python benchmarks/quantization.py --shape tiny --tokens 4      # to see it work

Rows are made and saved by transformers' `quantization_config` alone; what is not quantized is bfloat16, but for the
vectors, float32. Size, memory and speed are of random weights in `--shape`. Memory is the peak of a process that loads
what was saved and writes `--tokens` tokens: on a GPU what PyTorch's allocator gave out, on a CPU see `MEMORY` in
`measure.py`, here above what was resident before the model was loaded. Speed is of `generate`, one row, the likeliest
token each time; rows write by turns. On a CPU it counts CPU seconds, which other programs disturb less. Bits per byte
are of the model in the box on `--file`, UTF-8 with documents separated by <|endoftext|>, as `rwkv_eval.perplexity`
measures them.

First the logits of each row must be those of a model that holds the numbers which the row's matrices stand for; if
not, nothing is measured and the exit code is 1.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from measure import MEMORY, alone, environment, interleaved, peak_memory, progress
from safetensors import safe_open
from sides import SHAPES, ours
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TorchAoConfig

from modeling_rwkv import RwkvConfig, RwkvForCausalLM, demo_model_path
from modeling_rwkv.remarks import no_remarks
from rwkv_eval.documents import read_documents
from rwkv_eval.perplexity import measure

CHECKED = 64  # tokens
PROMPT = 16  # tokens
# Of the norm of logits: some roundings of 2^-8. bitsandbytes of 8 bits rounds what it multiplies, too.
TOLERANCE = {"bitsandbytes 8 bits": 2**-4}
FEW_ROUNDINGS = 2**-5


def torchao(kind: str, **options: Any) -> TorchAoConfig:
    import torchao.quantization as library

    return TorchAoConfig(getattr(library, kind)(**options))


def int4() -> TorchAoConfig:
    from torchao.quantization import PerGroup

    return torchao("IntxWeightOnlyConfig", weight_dtype=torch.int4, granularity=PerGroup(32))


ROWS: dict[str, Callable[[], Any]] = {
    "float32": lambda: None,
    "bfloat16": lambda: None,
    "int8": partial(torchao, "Int8WeightOnlyConfig"),
    "int4, a byte each": int4,
    "int4, packed": partial(torchao, "Int4WeightOnlyConfig", group_size=32, int4_packing_format="tile_packed_to_4d"),
    "bitsandbytes 8 bits": lambda: BitsAndBytesConfig(load_in_8bit=True),
    "bitsandbytes 4 bits": lambda: BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    ),
}


def obstacle(row: str, channels: int, device: str) -> str | None:
    """Why a row cannot be had for a model so wide."""
    if row == "int4, packed" and device == "cpu":
        return "torchao packs 4 bits for GPUs only"
    if row == "bitsandbytes 4 bits" and device == "cpu" and channels % 64:
        return f"on CPUs bitsandbytes wants widths of whole blocks of 64, not {channels}"
    return None


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    with no_remarks():
        if args.peak_of:
            print(json.dumps(peak(args.peak_of, args)))
            return 0
        with tempfile.TemporaryDirectory() as folder:
            report = run(args, Path(folder))
    print("\n".join(text(report)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot and report["agree"]:
        plot(report, args.plot)
    return 0 if report["agree"] else 1


def run(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Everything that was asked for; only parity where that fails."""
    ours(args.shape, args.seed, torch.float32).model.save_pretrained(folder / "random")
    sources = {"box": demo_model_path(), "shape": folder / "random"}
    models: dict[str, dict[str, nn.Module]] = {name: {} for name in sources}
    settings = {name: value for name, value in vars(args).items() if name not in ("json", "plot", "peak_of")}
    report: dict[str, Any] = {
        "settings": settings | {"file": args.file and args.file.name},
        "memory": "given out by PyTorch's allocator" if args.device == "cuda" else MEMORY,
        "environment": environment(["modeling-rwkv", "torch", "torchao", "transformers", "bitsandbytes"]),
        "rows": {},
        "left_out": {},
    }
    if args.device == "cuda":
        report["environment"]["gpu"] = torch.cuda.get_device_name()
    for row in args.rows:
        for name, source in sources.items():
            if reason := obstacle(row, RwkvConfig.from_pretrained(source).hidden_size, args.device):
                report["left_out"].setdefault(row, {})[name] = reason
            else:
                progress(f"{row}: {name}")
                models[name][row] = quantized(row, source, folder / name / row, args.device)
        if row in models["shape"]:
            report["rows"][row] = sizes(folder / "shape" / row, folder / "random")
    checked = {row: model for name in ("shape", "box") for row, model in models[name].items()}
    report["disagreement"] = {row: disagreement(model) for row, model in checked.items()}
    report["agree"] = all(found <= TOLERANCE.get(row, FEW_ROUNDINGS) for row, found in report["disagreement"].items())
    if report["agree"]:
        for row, seconds in speeds(models["shape"], args).items():
            report["rows"][row] |= {
                "seconds": seconds,
                "tokens_per_second": args.tokens / seconds[args.clock]["median"],
            }
            report["rows"][row]["peak_bytes"] = json.loads(alone("--peak-of", str(folder / "shape" / row)))
        for row, model in models["box"].items() if args.file else ():
            progress(f"{row}: bits per byte")
            found = measure(model, AutoTokenizer.from_pretrained(demo_model_path()), read_documents(args.file))
            report["rows"].setdefault(row, {})["bits_per_byte"] = found.bits_per_byte
    return report


def quantized(row: str, source: Path, folder: Path, device: str) -> nn.Module:
    """The model of ``source`` as ``row`` names it, saved to ``folder`` and loaded from there."""
    dtype = torch.float32 if row == "float32" else torch.bfloat16
    options = {"device_map": device, "dtype": dtype}
    AutoModelForCausalLM.from_pretrained(source, quantization_config=ROWS[row](), **options).save_pretrained(folder)
    return load(folder, device)


def load(folder: Path, device: str) -> nn.Module:
    model = AutoModelForCausalLM.from_pretrained(folder, device_map=device).eval()
    model.generation_config.update(eos_token_id=None, pad_token_id=None)  # it writes on
    return model


def matrices(model: nn.Module) -> dict[str, nn.Linear]:
    """What is quantized: the matrices of the blocks."""
    return {name: x for name, x in model.rwkv.named_modules(prefix="rwkv") if isinstance(x, nn.Linear)}


def sizes(folder: Path, plain: Path) -> dict[str, float]:
    """Bytes of the weights on disk, and bits for each weight of the matrices, with their scales."""
    with torch.device("meta"):
        model = RwkvForCausalLM(RwkvConfig.from_pretrained(plain))
    names, weights, bits = tuple(f"{name}." for name in matrices(model)), 0, 0
    weights = sum(matrix.weight.numel() for matrix in matrices(model).values())
    files = list(folder.glob("*.safetensors"))
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            bits += sum(8 * tensors.get_tensor(key).nbytes for key in tensors.keys() if key.startswith(names))  # noqa: SIM118
    return {"bits_per_weight": bits / weights, "bytes_on_disk": sum(file.stat().st_size for file in files)}


@torch.inference_mode()
def disagreement(model: nn.Module) -> float:
    """The norm of how logits differ from those of the numbers that the matrices stand for, relative.

    A matrix of any kind is known by its products with unit vectors.
    """
    ids = torch.arange(CHECKED, device=model.device)[None] % model.config.vocab_size
    found = model(input_ids=ids).logits.float()
    with torch.device("meta"):
        plain = RwkvForCausalLM(model.config)
    held = {f"{name}.weight": stands_for(matrix, model.dtype) for name, matrix in matrices(model).items()}
    plain.load_state_dict(dict(model.named_parameters()) | held, assign=True)
    expected = plain.eval()(input_ids=ids).logits.float()
    return float((found - expected).norm() / expected.norm())


def stands_for(matrix: nn.Linear, dtype: torch.dtype) -> Tensor:
    """(outputs, inputs)."""
    return matrix(torch.eye(matrix.in_features, dtype=dtype, device=matrix.weight.device)).T.contiguous()


def write(model: nn.Module, tokens: int) -> None:
    model.generate(
        torch.arange(PROMPT, device=model.device)[None], max_new_tokens=tokens, do_sample=False, use_cache=True
    )
    if model.device.type == "cuda":
        torch.cuda.synchronize()


def speeds(models: dict[str, nn.Module], args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Seconds of writing, by row and clock."""
    progress(f"speed of {', '.join(models)}")
    for model in models.values():
        write(model, 2)
    jobs = {row: partial(write, model, args.tokens) for row, model in models.items()}
    return {row: seconds.summary() for row, seconds in interleaved(jobs, args.repeats).items()}


def peak(folder: Path, args: argparse.Namespace) -> int:
    """Bytes that loading a model and writing take at the most, in a process that did nothing else."""

    def job() -> None:
        write(load(folder, args.device), args.tokens)

    if args.device == "cpu":
        write(ours("tiny", 0, torch.bfloat16).model, 2)  # what is built and loaded once,
        with suppress(ModuleNotFoundError):
            import bitsandbytes  # noqa: F401 - and imported
        return peak_memory(job)
    torch.cuda.reset_peak_memory_stats()
    job()
    return torch.cuda.max_memory_allocated()


def text(report: dict[str, Any]) -> list[str]:
    env, settings = report["environment"], report["settings"]
    lines = [
        f"{settings['shape']} (layers, channels, vocabulary: {SHAPES[settings['shape']]})",
        f"{env.get('gpu', env['cpu'])}, {env['threads']} threads, load {env['load_average']:.1f}, {env['date']}",
        "   ".join(f"{name} {version}" for name, version in env["versions"].items()),
        "",
        "beside the numbers that the matrices stand for: "
        + ", ".join(f"{row} {found:.1e}" for row, found in report["disagreement"].items()),
    ]
    if not report["agree"]:
        return [*lines, "", "They disagree: nothing was measured."]
    columns = {
        "bits/weight": ("bits_per_weight", 1, ".2f"),
        "disk MB": ("bytes_on_disk", 1e6, ".0f"),
        "peak MB": ("peak_bytes", 1e6, ".0f"),
        "tokens/s": ("tokens_per_second", 1, ".1f"),
        "bits/byte": ("bits_per_byte", 1, ".4f"),
    }
    lines += ["", f"{'':20}" + "".join(f"{head:>13}" for head in columns)]
    for row, found in report["rows"].items():
        cells = [f"{found[key] / unit:{form}}" if key in found else "-" for key, unit, form in columns.values()]
        lines.append(f"{row:20}" + "".join(f"{cell:>13}" for cell in cells))
    reasons = [f"{row}, {name}: {why}" for row, of in report["left_out"].items() for name, why in of.items()]
    return [*lines, "", *reasons]


def plot(report: dict[str, Any], path: Path) -> None:
    """A panel for each figure, a bar for each row."""
    from matplotlib.figure import Figure

    panels = {
        "size on disk, MB": ("bytes_on_disk", 1e6),
        "peak memory, MB": ("peak_bytes", 1e6),
        "tokens a second": ("tokens_per_second", 1),
        "bits per byte": ("bits_per_byte", 1),
    }
    figure = Figure(figsize=(11, 3), layout="constrained")
    for axes, (label, (key, unit)) in zip(figure.subplots(1, len(panels), sharey=True), panels.items(), strict=True):
        rows = list(report["rows"])
        axes.barh(rows, [report["rows"][row].get(key, 0) / unit for row in rows])
        axes.set(xlabel=label)
        axes.grid(alpha=0.3, axis="x")
    axes.invert_yaxis()
    env, settings = report["environment"], report["settings"]
    figure.suptitle(
        f"{settings['shape']}, {env.get('gpu', env['cpu'])}; bits per byte: the model in the box", fontsize=9
    )
    figure.savefig(path, dpi=90)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="169m")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), help="default: all")
    parser.add_argument("--file", type=Path, help="text for bits per byte; default: none are measured")
    parser.add_argument("--tokens", type=int, default=64, help="to write")
    parser.add_argument("--repeats", type=int, default=5, help="of the times")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of weights")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    parser.add_argument("--peak-of", type=Path, help=argparse.SUPPRESS)  # the process that measures a row's memory
    args = parser.parse_args()
    for name in ("tokens", "repeats"):
        if getattr(args, name) < 1:
            parser.error(f"{name} is {getattr(args, name)}; it must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("device is cuda, but there is no GPU that PyTorch can use; leave it out")
    args.clock = "wall" if args.device == "cuda" else "cpu"
    return args


if __name__ == "__main__":
    sys.exit(main())
