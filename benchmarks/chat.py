"""Time to the first token of an answer, turn by turn: from the state that was kept, and by reading the talk again.

    python benchmarks/chat.py                                       # the model in the box, a minute on one core
    python benchmarks/chat.py --json chat.json --plot chat.png
    python benchmarks/chat.py --shape world-0.1b --turns 50         # random weights; needs the `rwkv` package's words
    python benchmarks/chat.py --shape world-0.1b --device cuda

Both are the same model and the same tokens: `Conversation` as `rwkv chat` has it, and `generate` with the whole talk
and no cache. Messages and answers are always the same, whatever the model would say. For `Conversation` the time is
from `say` on, text and tokens included; the other is given its tokens. It ends when the logits of the first token are
there. On a CPU the figure shows CPU time, of all threads, which other programs disturb less than wall time. In every
turn the logits must be the same; if not, nothing is reported and the exit code is 1.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from measure import Seconds, environment, progress
from sides import SHAPES, SIDES
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, LogitsProcessor, LogitsProcessorList

from modeling_rwkv import RwkvTokenizer, demo_model_path
from modeling_rwkv.chat import Conversation

KEPT, AGAIN = "state kept", "all read again"
MESSAGES = ("What did the fox find?", "Where was it?", "Who else was in the wood that day, and why?", "And then?")
ANSWER = (
    " The little fox found a red ball under the old tree. She ran home with it, and all her friends came to play with "
    "her until the sun went down.\n\n"
)
TOLERANCE = 1e-5  # of the norm of logits: sums in another order, in float32


def main() -> int:
    args = arguments()
    torch.set_num_threads(args.threads)
    model, tokenizer = load(args)
    progress(f"warming up, then {args.repeats} talks of {args.turns} turns")
    talk(model, tokenizer, 2)
    talks = [talk(model, tokenizer, args.turns) for _ in range(args.repeats)]
    report: dict[str, Any] = {
        "settings": {name: value for name, value in vars(args).items() if name not in ("json", "plot")},
        "environment": environment(["modeling-rwkv", "torch", "transformers"]),
        "disagreement": max(turn["disagreement"] for turns in talks for turn in turns),
    }
    if args.device == "cuda":
        report["environment"]["gpu"] = torch.cuda.get_device_name()
    report["agree"] = report["disagreement"] <= args.tolerance
    if report["agree"]:
        report["turns"] = [
            {
                "tokens": same_turn[0]["tokens"],
                "seconds": {side: summary(turn["seconds"][side] for turn in same_turn) for side in (KEPT, AGAIN)},
            }
            for same_turn in zip(*talks, strict=True)
        ]
    print("\n".join(text(report)))
    if args.json:
        args.json.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot and report["agree"]:
        plot(report, args.plot)
    return 0 if report["agree"] else 1


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """The model in the box with its tokenizer, or random weights of a shape with the World tokenizer."""
    if args.shape == "box":
        folder = demo_model_path()
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        tokenizer = AutoTokenizer.from_pretrained(folder)
    else:
        model, tokenizer = SIDES["ours"].load(args.shape, args.seed, torch.float32).model, RwkvTokenizer()
    return model.to(args.device).eval(), tokenizer


def summary(samples: Iterable[tuple[float, float]]) -> dict[str, dict[str, float | list[float]]]:
    wall, cpu = map(list, zip(*samples, strict=True))
    return Seconds(wall, cpu).summary()


class Script(LogitsProcessor):
    """Makes `generate` say these ids, and looks at the clocks, wall and CPU, when the first is to be chosen."""

    def __init__(self, ids: list[int], read: list[int]) -> None:
        self.ids, self.read, self.said = ids, read, 0
        self.begin = time.perf_counter(), time.process_time()

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.said == 0:
            self.logits = scores.cpu()  # waits for a GPU
            wall, cpu = self.begin
            self.seconds = time.perf_counter() - wall, time.process_time() - cpu
            self.tokens = list(self.read)
        self.said += 1
        wanted = torch.tensor([self.ids[self.said - 1]], device=scores.device)
        return torch.full_like(scores, -torch.inf).index_fill(1, wanted, 0.0)


@torch.no_grad()
def talk(model: Any, tokenizer: Any, turns: int) -> list[dict[str, Any]]:
    """For every turn the tokens that each side reads before its answer, the seconds, and how the logits differ."""
    conversation, ids = Conversation(model, tokenizer), tokenizer(ANSWER, add_special_tokens=False).input_ids
    read, kept, found = list[int](), list[int](), []
    hook = model.base_model.register_forward_pre_hook(lambda _, given: read.extend(given[0][0].tolist()))
    for turn in range(turns):
        read.clear()
        ours = Script(ids, read)
        speak = {"logits_processor": LogitsProcessorList([ours]), "do_sample": False, "max_new_tokens": len(ids)}
        conversation.say(MESSAGES[turn % len(MESSAGES)], **speak)
        new = list(read)
        whole = torch.tensor([kept + ours.tokens], device=model.device)
        theirs = Script(ids, read)
        speak |= {"logits_processor": LogitsProcessorList([theirs]), "max_new_tokens": 1}
        model.generate(whole, attention_mask=torch.ones_like(whole), **speak)
        while not conversation.place.state.has_read(torch.tensor([kept + new])):
            new.pop()  # what an answer ends with was read, and not kept
        kept += new
        found.append(
            {
                "tokens": {KEPT: len(ours.tokens), AGAIN: whole.shape[1]},
                "seconds": {KEPT: ours.seconds, AGAIN: theirs.seconds},
                "disagreement": float((ours.logits - theirs.logits).norm() / theirs.logits.norm()),
            }
        )
    hook.remove()
    return found


def text(report: dict[str, Any]) -> list[str]:
    env, settings = report["environment"], report["settings"]
    lines = [
        f"{settings['shape']} (layers, channels, vocabulary: {SHAPES[settings['shape']]}), float32",
        f"{env.get('gpu', env['cpu'])}, {env['threads']} threads, load {env['load_average']:.1f}, {env['date']}",
        "   ".join(f"{name} {version}" for name, version in env["versions"].items()),
        f"logits differ by {report['disagreement']:.1e} (allowed: {settings['tolerance']:.1e})",
    ]
    if not report["agree"]:
        return [*lines, "", "They disagree: nothing is reported."]
    row = "{:>6}{:>16}{:>10}{:>10}{:>20}{:>10}{:>10}"
    lines += ["", row.format("turn", KEPT, "wall ms", "CPU ms", AGAIN, "wall ms", "CPU ms")]
    for number, turn in enumerate(report["turns"], 1):
        if number in (1, 2) or number % 10 == 0 or number == len(report["turns"]):
            cells = []
            for side, tokens in turn["tokens"].items():
                cells += [
                    tokens,
                    *(f"{turn['seconds'][side][clock]['median'] * 1e3:.1f}" for clock in ("wall", "cpu")),
                ]
            lines.append(row.format(number, *cells))
    return [*lines, "", f"tokens read before an answer, and medians of {settings['repeats']} talks"]


def plot(report: dict[str, Any], path: Path) -> None:
    from matplotlib.figure import Figure

    clock = report["settings"]["clock"]
    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for side in (AGAIN, KEPT):
        seconds = [turn["seconds"][side][clock]["median"] * 1e3 for turn in report["turns"]]
        axes.plot(range(1, len(seconds) + 1), seconds, marker=".", label=side)
    label = {"wall": "milliseconds", "cpu": "CPU milliseconds"}[clock] + " to the first token"
    axes.set(xlabel="turn", ylabel=label, xlim=(0, None), ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    env, shape = report["environment"], SHAPES[report["settings"]["shape"]]
    figure.suptitle(f"{shape}, float32, {env.get('gpu', env['cpu'])}", fontsize=9)
    figure.savefig(path, dpi=90)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--shape", choices=["box", *(name for name in SHAPES if name.startswith("world"))], default="box"
    )
    parser.add_argument("--turns", type=int, default=50)
    parser.add_argument("--repeats", type=int, default=3, help="talks, of whose times medians are taken")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="on a CPU")
    parser.add_argument("--seed", type=int, default=0, help="of random weights")
    parser.add_argument("--tolerance", type=float, default=TOLERANCE, help="0 is always missed")
    parser.add_argument("--json", type=Path, help="where to write every figure")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    args = parser.parse_args()
    for name in ("turns", "repeats", "threads"):
        if getattr(args, name) < 1:
            parser.error(f"{name} is {getattr(args, name)}; it must be at least 1")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("device is cuda, but there is no GPU that PyTorch can use; leave it out")
    args.clock = "wall" if args.device == "cuda" else "cpu"
    return args


if __name__ == "__main__":
    sys.exit(main())
