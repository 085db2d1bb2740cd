"""Fine-tune the model in the box on an instruction set, by LoRA, in full and by its state, and compare.

    python benchmarks/instruct.py --data instruction-data.json --runs runs/instruct

Runs the commands that it prints, one after the other; what is finished already is not run again. Prints the tables of
finetune/README.md: cost and loss of each, and answers to three prompts before and after, the likeliest tokens each
time. Draws the validation losses. `--data` is a file as rwkv_finetune/examples.py reads them, of which a tenth is
held out; figures there are of 1,100 rows (rasbt/LLMs-from-scratch, Apache-2.0).
"""

import argparse
import json
import shlex
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from peft import AutoPeftModelForCausalLM
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_rwkv import demo_model_path
from rwkv_finetune.examples import instruction_prompt
from rwkv_finetune.report import plot_loss

ROOT = Path(__file__).parent.parent
METHODS = {"full": "--learning_rate 1.0e-3", "lora": "", "state": "--learning_rate 0.3"}
PROMPTS = (
    ("Rewrite the sentence in the past tense.", "The cat sits on the mat."),
    ("What is the opposite of hot?", ""),
    ("Name three colors.", ""),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="the instruction set")
    parser.add_argument("--runs", type=Path, required=True, help="folder of the runs")
    parser.add_argument("--plot", type=Path, default=ROOT / "benchmarks" / "instruct-cpu.png")
    args = parser.parse_args()
    rows, answers, curves = [], {"before": answer(AutoModelForCausalLM.from_pretrained(demo_model_path()))}, {}
    for method, options in METHODS.items():
        output = args.runs / method
        command = (
            f"python -m rwkv_finetune.{method} --config finetune/instruct.yaml {options} "
            f"--train_file {shlex.quote(args.data)} --output_dir {shlex.quote(str(output))}"
        )
        print(" ".join(command.split()), flush=True)
        subprocess.run([sys.executable, *shlex.split(command)[1:]], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        history = json.loads((output / "trainer_state.json").read_text())["log_history"]
        curves[method] = [(e["epoch"], e["eval_loss"]) for e in history if "eval_loss" in e]
        rows.append(row(method, output, history))
        answers[method] = answer(load(method, output))
    print("\n| method | trained parameters | file (MB) | peak memory (GiB) | tokens/s | validation loss |")
    print("| --- | --- | --- | --- | --- | --- |")
    print("\n".join(rows))
    for i, prompt in enumerate(PROMPTS):
        print(f"\n**{' '.join(filter(None, prompt))}**\n")
        print("\n".join(f"- {name}: {texts[i]}" for name, texts in answers.items()))
    plot_loss(curves, args.plot, against="epochs")
    print(f"\n{args.plot}")


def row(method: str, output: Path, history: list[dict[str, float]]) -> str:
    """A line of the table, from what a run recorded."""
    result = output / {"full": "model", "lora": "adapter", "state": "state"}[method]
    card = (result / "README.md").read_text()
    trained = card.split("| trained parameters | ")[1].split(" |")[0]
    size = sum(path.stat().st_size for path in result.glob("*.safetensors")) / 1e6
    speed = statistics.median(e["tokens_per_second"] for e in history if "tokens_per_second" in e)
    memory = max(e["peak_memory"] for e in history if "peak_memory" in e)
    losses = [e["eval_loss"] for e in history if "eval_loss" in e]
    return f"| {method} | {trained} | {size:.2f} | {memory:.2f} | {speed:,.0f} | {losses[0]:.3f} to {losses[-1]:.3f} |"


def load(method: str, output: Path) -> Any:
    """The model that a run made."""
    if method == "lora":
        return AutoPeftModelForCausalLM.from_pretrained(output / "adapter")
    if method == "full":
        return AutoModelForCausalLM.from_pretrained(output / "model", dtype=torch.float32)
    model = AutoModelForCausalLM.from_pretrained(demo_model_path())
    model.set_initial_state(output / "state" / "state.safetensors")
    return model


def answer(model: Any) -> list[str]:
    """To each of the PROMPTS, up to 40 of the likeliest tokens, in one line."""
    tokenizer, texts = AutoTokenizer.from_pretrained(demo_model_path()), []
    for prompt in PROMPTS:
        ids = tokenizer(instruction_prompt(*prompt), return_tensors="pt").input_ids
        written = model.float().generate(input_ids=ids, max_new_tokens=40, do_sample=False)[0, ids.shape[1] :]
        texts.append(" ".join(tokenizer.decode(written, skip_special_tokens=True).split()) or "(nothing)")
    return texts


if __name__ == "__main__":
    main()
