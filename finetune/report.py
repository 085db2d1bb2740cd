"""The model card and the loss curve of a run, from what the run itself recorded."""

import os
import platform
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import GenerationConfig

from rwkv_finetune.run_folder import unfinished
from rwkv_finetune.trainer import RwkvTrainer

CARD = """\
---
{front_matter}
---

# {name}

An RWKV-4 language model, {layers} layers x {width} wide, {parameters:,} parameters, vocabulary
{vocabulary:,}, trained from scratch with `python -m rwkv_finetune.pretrain`.

```python
import modeling_rwkv  # the RWKV classes for transformers' Auto classes
from transformers import pipeline

generate = pipeline("text-generation", model="PATH_OF_THIS_FOLDER")
print(generate("Once upon a time", max_new_tokens=100, do_sample=True)[0]["generated_text"])
```

## Results

| validation measure | value |
| --- | --- |
| loss (nats per token, `<\\|endoftext\\|>` included) | {loss:.4f} |
| perplexity (per token) | {perplexity:.3f} |
| bits per byte (text tokens / UTF-8 bytes of the text) | {bits_per_byte:.4f} |

Measured on the weights as they are stored ({dtype}), in rows of {block_size} tokens: what comes
later in a longer document is read without what came before, so the model that keeps its state
does a little better than this.

![training and validation loss](loss.png)

## Training

| fact | value |
| --- | --- |
{facts}

```bash
{command}
```

The same settings in full (for `--config`; every other one has its default):

```yaml
{settings}```

## Data

{sources}
"""


@dataclass
class CardArguments:
    """What the model card says that the run cannot know."""

    model_name: str = field(default="rwkv-4", metadata={"help": "title of the card"})
    license: str = field(default="apache-2.0", metadata={"help": "of the weights, a Hub id"})
    language: list[str] = field(default_factory=lambda: ["en"], metadata={"help": "ISO 639-1"})
    data_sources: list[str] = field(
        default_factory=list, metadata={"help": "sources of the text, with their licences"}
    )


def hardware() -> str:
    """The machine in words, as it names itself."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{cpu_name()}, {os.cpu_count()} logical CPUs, {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """The CPU's model name where the system gives one, else its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def software() -> str:
    """Versions of what the result depends on."""
    return f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"


def run_facts(trainer: RwkvTrainer) -> dict[str, str]:
    """The training table of the card: name to value."""
    args, state, data = trainer.args, trainer.state, trainer.train_dataset
    last = state.log_history[-1]
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        "tokens seen": f"{last['num_input_tokens_seen']:,}, padding not counted",
        "steps": f"{state.global_step:,} of {rows} rows x {data.block_size} tokens",
        "epochs": f"{state.epoch:.2f}",
        "training text": f"{len(data.tokens):,} tokens, {data.waste:.1%} of the rows is padding",
        "wall time": f"{last['wall_seconds'] / 60:.1f} minutes",
        "hardware": hardware(),
        "software": software(),
        "precision": f"weights and optimizer in float32, matrix products in {precision}",
    }


def card_text(
    trainer: RwkvTrainer,
    dtype: str,
    metrics: Mapping[str, float],
    card_args: CardArguments,
    settings: Mapping[str, Any],
    command: str,
) -> str:
    """A model card with the front matter that the Hub reads; for the arguments see `save_result`."""
    result = EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name="validation text of the run",
        metric_type="bits_per_byte",
        metric_value=round(metrics["eval_bits_per_byte"], 4),
    )
    front_matter = ModelCardData(
        language=card_args.language,
        license=card_args.license,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["rwkv"],
        model_name=card_args.model_name,
        eval_results=[result],
    )
    config = trainer.model.config
    return CARD.format(
        front_matter=front_matter.to_yaml().strip(),
        name=card_args.model_name,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        parameters=trainer.model.num_parameters(),
        dtype=dtype,
        block_size=trainer.train_dataset.block_size,
        loss=metrics["eval_loss"],
        perplexity=metrics["eval_perplexity"],
        bits_per_byte=metrics["eval_bits_per_byte"],
        facts="\n".join(f"| {key} | {value} |" for key, value in run_facts(trainer).items()),
        command=command,
        settings=yaml.safe_dump(dict(settings), sort_keys=False, width=96),
        sources="\n".join(f"- {source}" for source in card_args.data_sources) or "Not stated.",
    )


def plot_loss(log_history: Sequence[Mapping[str, float]], path: Path) -> None:
    """Training and validation loss (nats per token) against training tokens, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for key, label in (("loss", "training"), ("eval_loss", "validation")):
        points = [(e["num_input_tokens_seen"], e[key]) for e in log_history if key in e]
        if points:
            tokens, losses = zip(*points, strict=True)
            axes.plot([t / 1e6 for t in tokens], losses, marker=".", label=f"{label} ({losses[-1]:.3f})")
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def save_result(
    trainer: RwkvTrainer,
    dtype: str,
    metrics: Mapping[str, float],
    card_args: CardArguments,
    settings: Mapping[str, Any],
    command: str,
) -> Path:
    """Write `output_dir/model`, all of it or nothing: weights, tokenizer, card, curve.

    Args:
        dtype: of the weights in the file.
        metrics: `eval_loss`, `eval_perplexity` and `eval_bits_per_byte` of the final weights.
        settings: the options of the run, as its `--config` file would give them.
        command: what was typed.
    """
    folder = Path(trainer.args.output_dir) / "model"
    new = unfinished(folder)
    shutil.rmtree(new, ignore_errors=True)
    model, tokenizer = trainer.accelerator.unwrap_model(trainer.model), trainer.processing_class
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.config.use_cache = True  # the Trainer had switched it off
    model.to(getattr(torch, dtype)).save_pretrained(new)
    tokenizer.save_pretrained(new)
    plot_loss(trainer.state.log_history, new / "loss.png")
    card = card_text(trainer, dtype, metrics, card_args, settings, command)
    (new / "README.md").write_text(card, encoding="utf-8")
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(new, folder)
    return folder
