"""The harness model `rwkv` beside the harness's own `hf`: the same requests, tokens computed and time.

    python benchmarks/zero_shot.py                                      # the bundled sample, to see it work
    python benchmarks/zero_shot.py --data DIR --limit 300 --json zero_shot.json --plot benchmarks/zero_shot-cpu.png
    python benchmarks/zero_shot.py --data DIR --tasks hellaswag arc_challenge:5 --model MODEL_FOLDER

DIR has JSONL files as rwkv_eval/local_data.py reads them; TASK:5 is a task with five examples before each question.
First, in float32 and for every batch size, the log-likelihood of every request must be that of `hf` to 1e-4, and every
`is_greedy` the same; if not, no speed is measured and the exit code is 1. That comparison is also the warm-up.
Then both are timed by turns, from texts to numbers, tokenisation included.

Tokens of `hf` are those of its texts, once for each context and continuation but for the last token, which is how it
groups requests; its batches also have padding, which it computes. Tokens of `rwkv` are all that it computes.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from measure import environment, interleaved, progress

from modeling_rwkv import demo_model_path
from rwkv_eval.harness import RwkvLM
from rwkv_eval.zero_shot import SAMPLE, find_tasks, index

TASKS = ["lambada_openai", "piqa", "boolq", "hellaswag", "arc_easy", "arc_challenge", "arc_challenge:5"]
OURS, STOCK = "rwkv", "hf"
SEED = 1234  # of few-shot examples


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    models = {batch_size: load(RwkvLM, args, batch_size) for batch_size in {*args.batch_sizes, args.batch_size}}
    sides = {OURS: models[args.batch_size], STOCK: load(HFLM, args, args.batch_size)}
    report: dict[str, Any] = {
        "settings": {name: str(value) for name, value in vars(args).items() if name not in ("json", "plot")},
        "environment": environment(["modeling-rwkv", "torch", "transformers", "lm_eval"]),
        "tasks": {},
    }
    requests = {name: requests_of(name, args) for name in args.tasks}
    for name, asked in requests.items():
        progress(f"comparing {name}: {len(asked)} requests")
        report["tasks"][name] = {"requests": len(asked)} | compare(asked, models, sides[STOCK])
    report["agree"] = all(agrees(found, args.tolerance) for found in report["tasks"].values())
    if report["agree"]:
        for name, found in report["tasks"].items():
            progress(f"timing {name}")
            found |= measure(requests[name], sides, args.repeats)
    print("\n".join(text(report)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot and report["agree"]:
        plot(report, args.plot)
    return 0 if report["agree"] else 1


def load(kind: type[HFLM], args: argparse.Namespace, batch_size: int) -> HFLM:
    return kind(str(args.model), dtype="float32", device=args.device, batch_size=batch_size)


def requests_of(name: str, args: argparse.Namespace) -> list[Instance]:
    """The requests of a task, or of TASK:SHOTS."""
    task_name, _, shots = name.partition(":")
    ((task,), _) = find_tasks(index([task_name]), [task_name], args.data, num_fewshot=int(shots or 0))
    task.set_config("num_fewshot", int(shots or 0))
    task.set_fewshot_seed(SEED)
    task.build_all_requests(limit=args.limit)
    return task.instances


def compare(requests: list[Instance], models: dict[int, RwkvLM], stock: HFLM) -> dict[str, Any]:
    """By batch size: the largest difference of a log-likelihood from ``stock``, and how many flags differ."""
    expected = stock.loglikelihood(requests, disable_tqdm=True)
    found: dict[str, Any] = {"difference": {}, "other_flags": {}}
    for batch_size, model in sorted(models.items()):
        actual = model.loglikelihood(requests, disable_tqdm=True)
        pairs = list(zip(actual, expected, strict=True))
        found["difference"][batch_size] = max(abs(a - b) for (a, _), (b, _) in pairs)
        found["other_flags"][batch_size] = sum(a != b for (_, a), (_, b) in pairs)
    return found


def agrees(found: dict[str, Any], tolerance: float) -> bool:
    return not any(found["other_flags"].values()) and all(x <= tolerance for x in found["difference"].values())


def measure(requests: list[Instance], sides: dict[str, HFLM], repeats: int) -> dict[str, Any]:
    """Tokens and seconds of each side, and how many times ours ``hf`` needs."""
    jobs: dict[str, Callable[[], object]] = {
        name: partial(side.loglikelihood, requests, disable_tqdm=True) for name, side in sides.items()
    }
    encoded = [sides[STOCK]._encode_pair(*request.args) for request in requests]
    texts = {tuple(context + continuation[:-1]) for context, continuation in encoded}
    tokens = {OURS: tokens_of(sides[OURS], jobs[OURS]), STOCK: sum(map(len, texts))}
    seconds = {name: x.summary() for name, x in interleaved(jobs, repeats).items()}
    ratios = {"tokens": tokens[STOCK] / tokens[OURS]}
    for clock in ("wall", "cpu"):
        ratios[clock] = seconds[STOCK][clock]["median"] / seconds[OURS][clock]["median"]
    padded = tokens_of(sides[STOCK], jobs[STOCK])
    return {"tokens": tokens, "with_padding": {STOCK: padded}, "seconds": seconds, "times_ours": ratios}


def tokens_of(side: HFLM, job: Callable[[], object]) -> int:
    """Tokens that a job gives to the model and that the model computes: not those under a mask."""
    count = 0

    def hook(module: torch.nn.Module, inputs: tuple[Any, ...], options: dict[str, Any]) -> None:
        nonlocal count
        mask = options.get("attention_mask")
        ids = inputs[0] if inputs and inputs[0] is not None else options["input_ids"]
        count += ids.numel() if mask is None else int(mask.sum())

    handle = side.model.base_model.register_forward_pre_hook(hook, with_kwargs=True)
    job()
    handle.remove()
    return count


def text(report: dict[str, Any]) -> list[str]:
    env = report["environment"]
    lines = [f"{report['settings']['model']}, float32, {env['cpu']}, {env['threads']} threads, {env['date']}"]
    lines.append("   ".join(f"{name} {version}" for name, version in env["versions"].items()))
    row = "{:16}{:>9}{:>11}{:>6}{:>10}{:>11}{:>7}{:>9}{:>9}{:>7}{:>9}"
    head = ["task", "requests", "difference", "flags", "tokens", "hf", "times", "wall s", "hf", "times", "CPU times"]
    lines += ["", row.format(*head)]
    for name, found in report["tasks"].items():
        worst, flags = max(found["difference"].values()), sum(found["other_flags"].values())
        cells = [name, found["requests"], f"{worst:.1e}", flags]
        if "seconds" in found:
            cells += [f"{found['tokens'][side]:,}" for side in (OURS, STOCK)]
            cells += [f"{found['times_ours']['tokens']:.2f}"]
            cells += [f"{found['seconds'][side]['wall']['median']:.2f}" for side in (OURS, STOCK)]
            cells += [f"{found['times_ours'][clock]:.2f}" for clock in ("wall", "cpu")]
        lines.append(row.format(*cells, *[""] * (len(head) - len(cells))))
    if not report["agree"]:
        return [*lines, "", "The sides disagree: speed was not measured."]
    turns = median(len(found["seconds"][OURS]["wall"]["samples"]) for found in report["tasks"].values())
    note = "difference: the largest of all requests and batch sizes; flags: how many differ; wall s: medians of"
    return [*lines, "", f"{note} {turns:.0f}, by turns"]


def plot(report: dict[str, Any], path: Path) -> None:
    """How many times ours `hf` needs, task by task."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4), layout="constrained")
    axes, names = figure.subplots(), list(report["tasks"])
    for i, (key, label) in enumerate({"tokens": "tokens", "wall": "wall time", "cpu": "CPU time"}.items()):
        heights = [report["tasks"][name]["times_ours"][key] for name in names]
        bars = axes.bar([x + 0.27 * i for x in range(len(names))], heights, 0.25, label=label)
        axes.bar_label(bars, fmt="%.1f", fontsize=8)
    axes.axhline(1, color="black", linewidth=0.8)
    axes.set_xticks(
        [x + 0.27 for x in range(len(names))], [name.replace(":", ", shots: ") for name in names], rotation=20
    )
    axes.set(ylabel="hf / rwkv", title="What lm-evaluation-harness's own model needs, in ours")
    axes.legend()
    figure.savefig(path, dpi=120)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SAMPLE, help="folder of JSONL files [default: the sample]")
    parser.add_argument("--tasks", nargs="+", default=TASKS, metavar="TASK[:SHOTS]")
    parser.add_argument("--limit", type=int, help="documents of each task [default: all]")
    parser.add_argument("--model", type=Path, default=demo_model_path(), help="[default: the model in the box]")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch-size", type=int, default=32, help="of both, for the times")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 7, 32], help="of ours, to be compared")
    parser.add_argument("--repeats", type=int, default=3, help="of each measurement")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--tolerance", type=float, default=1e-4, help="in nats a request; below 0, always missed")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    return parser.parse_args()


if __name__ == "__main__":
    sys.exit(main())
