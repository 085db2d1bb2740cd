"""How fast text is written on a GPU, beside peers and beside how fast its memory is copied.

    python benchmarks/generate_gpu.py                                 # the 1.5B shape in bfloat16, 1 to 512 rows
    python benchmarks/generate_gpu.py --json generate.json --plot generate.png
    python benchmarks/generate_gpu.py --shape tiny --batches 1 5 --tokens 4 --repeats 1 --device cpu  # to see it work

Ways to write: ours; ours with ``cache_implementation="static"``; ours with ``native_decoding`` off, module by module;
GPT-NeoX of the same shape with its KV cache; and, one row only, as it gives wrong results for batches, the RWKV-4 that
is built into transformers. The likeliest token each time, by `generate`. The time of a token is the difference between
writing `--tokens` more and writing a few, divided by their number. Beside it stands, of ours, the time of a step that
the CPU does not wait for, from many in a row between two events of the device.

The ceiling is reading the weights, all but the embeddings, as fast as a GiB is copied, counting what is read and what
is written. First every RWKV-4 must begin with the same tokens in float32, for every batch; if not, no speed is printed
and the exit code is 1.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import torch
from measure import environment, interleaved_on_gpu, progress, turns
from sides import SHAPES, builtin, gpt_neox, ours
from torch import Tensor

from modeling_rwkv import RwkvStaticCache

OURS, STATIC, MODULES, NEOX, BUILT_IN = "ours", "ours, static", "ours, by modules", "GPT-NeoX", "built-in"
WAYS = (OURS, STATIC, MODULES, NEOX, BUILT_IN)
SAME = (OURS, STATIC, MODULES, BUILT_IN)  # the same function of the same weights
PARITY_SHAPE, PARITY_TOKENS = "box", 8
WARM = 4  # tokens
PROMPT = 16
STEPS = 50
COPIED = 2**30  # bytes


def load(ways: list[str], shape: str, dtype: torch.dtype, args: argparse.Namespace) -> dict[str, Any]:
    makers = {OURS: ours, NEOX: gpt_neox, BUILT_IN: builtin}
    wanted = dict.fromkeys(OURS if way in (STATIC, MODULES) else way for way in ways)
    models = {name: makers[name](shape, args.seed, dtype, args.device).model.eval() for name in wanted}
    for model in models.values():
        model.generation_config.update(eos_token_id=None, pad_token_id=None)
    return {way: models[OURS if way in (STATIC, MODULES) else way] for way in ways}


def ways_for(batch: int, args: argparse.Namespace) -> list[str]:
    return [way for way in args.ways if batch == 1 or way != BUILT_IN]


def write(way: str, model: Any, ids: Tensor, tokens: int) -> Tensor:
    """``tokens`` more, greedily."""
    if way in (OURS, STATIC, MODULES):
        model.native_decoding = way != MODULES
    static = {"cache_implementation": "static"} if way == STATIC else {}
    return model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False, use_cache=True, **static
    )


def prompt(shape: str, batch: int, args: argparse.Namespace) -> Tensor:
    generator = torch.Generator().manual_seed(args.seed)
    return torch.randint(SHAPES[shape][-1], (batch, PROMPT), generator=generator).to(args.device)


def disagreements(args: argparse.Namespace) -> list[str]:
    models: dict[str, Any] = load([way for way in args.ways if way in SAME], PARITY_SHAPE, torch.float32, args)
    found: list[str] = []
    for batch in args.batches:
        ids = prompt(PARITY_SHAPE, batch, args)
        texts = {way: write(way, models[way], ids, PARITY_TOKENS) for way in ways_for(batch, args) if way in SAME}
        found += [f"{batch} rows: {way}" for way, text in texts.items() if not torch.equal(text, texts[OURS])]
    return found


def seconds(way: str, model: Any, ids: Tensor, tokens: int) -> float:
    """That a token takes, after the first few."""
    times = []
    for n in (WARM, WARM + tokens):
        wait(ids)
        begin = time.perf_counter()
        write(way, model, ids, n)
        wait(ids)
        times.append(time.perf_counter() - begin)
    return (times[1] - times[0]) / tokens


def wait(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()


@torch.no_grad()
def step_seconds(model: Any, ids: Tensor, repeats: int) -> float:
    """That a token takes the GPU, where the CPU is ahead of it."""
    model.native_decoding = True
    cache = RwkvStaticCache()
    model(ids, past_key_values=cache, use_cache=True)
    one = ids[:, :1].clone()

    def steps() -> None:
        for _ in range(STEPS):
            model(one, past_key_values=cache, use_cache=True)

    steps()
    return median(interleaved_on_gpu({"steps": steps}, repeats)["steps"]) / STEPS


def copy_speed(repeats: int) -> float:
    """Bytes a second, read and written."""
    a, b = torch.ones(COPIED, dtype=torch.uint8, device="cuda"), torch.empty(COPIED, dtype=torch.uint8, device="cuda")
    b.copy_(a)
    return 2 * COPIED / min(interleaved_on_gpu({"copy": lambda: b.copy_(a)}, 10 * repeats)["copy"])


def measure(args: argparse.Namespace, report: dict[str, Any]) -> None:
    progress(f"loading {args.shape}")
    models, on_gpu = load(args.ways, args.shape, torch.bfloat16, args), args.device == "cuda"
    embeddings = models[OURS].get_input_embeddings().weight
    size = sum(x.numel() * x.element_size() for x in models[OURS].parameters() if x is not embeddings)
    for way in args.ways:  # what libraries keep is no way's own
        write(way, models[way], prompt(args.shape, 1, args), WARM)
    report |= {"weight_bytes": size, "ceiling_seconds": size / copy_speed(args.repeats) if on_gpu else None}
    for batch in args.batches:
        progress(f"{batch} rows")
        ids, ways = prompt(args.shape, batch, args), ways_for(batch, args)
        peaks = {way: peak(way, models[way], ids, args.tokens) for way in ways}
        times: dict[str, list[float]] = {way: [] for way in ways}
        for way in turns(ways, args.repeats):
            times[way].append(seconds(way, models[way], ids, args.tokens))
        report["batches"][batch] = {
            "token_seconds": times,
            "peak_bytes": peaks if on_gpu else {},
            "step_seconds": step_seconds(models[OURS], ids, args.repeats) if on_gpu else None,
        }


def peak(way: str, model: Any, ids: Tensor, tokens: int) -> int:
    """Bytes that PyTorch's allocator gives out above what it had given out before.

    Of the first writing of so many rows: later ones find the memory of a graph there.
    """
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    write(way, model, ids, tokens)
    return torch.cuda.max_memory_allocated() - before


def text(report: dict[str, Any]) -> list[str]:
    env, settings = report["environment"], report["settings"]
    lines = [
        f"RWKV-4 {settings['shape']} (layers, channels, vocabulary: {SHAPES[settings['shape']]}), random, bfloat16",
        f"{report['device']}, {env['cpu']}, {env['date']}",
        "   ".join(f"{name} {version}" for name, version in env["versions"].items()),
    ]
    if report["disagree"]:
        return [*lines, "", "Not the tokens that ours writes, so speed is not shown:", *report["disagree"]]
    row = "{:>5}  {:18}{:>12}{:>12}{:>10}{:>10}"
    lines += ["", row.format("rows", "", "ms a token", "tokens/s", "ceiling", "peak MiB")]
    for batch, found in report["batches"].items():
        for way, times in found["token_seconds"].items():
            memory = f"{found['peak_bytes'][way] / 2**20:.0f}" if found["peak_bytes"] else ""
            lines.append(row.format(batch, way, *cells(median(times), batch, report), memory))
        if found["step_seconds"]:
            lines.append(row.format(batch, "a step of ours", *cells(found["step_seconds"], batch, report), ""))
    if report["ceiling_seconds"]:
        lines.append(row.format("", "reading weights", *cells(report["ceiling_seconds"], 1, report), ""))
    return [
        *lines,
        "",
        f"medians of {settings['repeats']}, ways by turns; peak: of the first writing, above model and prompt",
    ]


def cells(seconds: float, batch: int, report: dict[str, Any]) -> list[str]:
    share = f"{report['ceiling_seconds'] / seconds:.0%}" if report["ceiling_seconds"] else ""
    return [f"{1e3 * seconds:.3f}", f"{batch / seconds:,.0f}", share]


def plot(report: dict[str, Any], path: Path) -> None:
    """Tokens a second against rows of the batch."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for way in report["settings"]["ways"]:
        found = {b: f["token_seconds"][way] for b, f in report["batches"].items() if way in f["token_seconds"]}
        axes.plot(list(found), [batch / median(times) for batch, times in found.items()], marker="o", label=way)
    axes.set(xlabel="rows of the batch", ylabel="tokens/s", xscale="log", yscale="log")
    axes.set_title(f"RWKV-4 {report['settings']['shape']}, bfloat16, {report['device']}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=90)


def main() -> int:
    args = arguments()
    report: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "plot")},
        "environment": environment(["modeling-rwkv", "torch", "transformers"]),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "no GPU",
        "disagree": disagreements(args),
        "batches": {},
    }
    if not report["disagree"]:
        measure(args, report)
    print("\n".join(text(report)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot and not report["disagree"]:
        plot(report, args.plot)
    return 1 if report["disagree"] else 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="1b5")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 128, 512])
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--tokens", type=int, default=64, help="to write")
    parser.add_argument("--repeats", type=int, default=5, help="of each measurement")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--seed", type=int, default=0, help="of weights and prompts")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--plot", type=Path, help="where to draw tokens a second")
    args = parser.parse_args()
    if OURS not in args.ways:
        parser.error(f"ways are {', '.join(args.ways)}: {OURS} is what the others are compared with")
    if min([*args.batches, args.tokens, args.repeats]) < 1:
        parser.error("give at least 1 of everything")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("PyTorch sees no CUDA device: give --device cpu to see it work")
    return args


if __name__ == "__main__":
    sys.exit(main())
