"""The model card and the loss curve of a run, from what the run itself recorded."""

import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCardData
from transformers import GenerationConfig, TrainerState
from transformers.trainer import TRAINING_ARGS_NAME

from rwkv_finetune.packing import PackedRows
from rwkv_finetune.run import PATHS
from rwkv_finetune.run_folder import unfinished
from rwkv_finetune.trainer import RwkvTrainer

CARD = """\
---
{front_matter}
---

# {name}

{introduction}

{use}

## Results

{results}

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

USE = """\
```python
import modeling_rwkv  # the RWKV classes for transformers' Auto classes
from transformers import pipeline

generate = pipeline("text-generation", model="PATH_OF_THIS_FOLDER")
print(generate("Once upon a time", max_new_tokens=100, do_sample=True)[0]["generated_text"])
```"""

RESULTS = """\
| validation measure | value |
| --- | --- |
{rows}

Measured on the weights as they are stored ({dtype}), in rows of {length} tokens{cut}"""

CUT = """: what comes
later in a longer document is read without what came before, so the model that keeps its state
does a little better than this."""

MEASURES = {  # name: (in words, digits)
    "loss_before": ("loss before training", ".4f"),
    "loss": ("loss (nats per predicted token, `<\\|endoftext\\|>` included)", ".4f"),
    "perplexity": ("perplexity (per token)", ".3f"),
    "bits_per_byte": ("bits per byte (text tokens / UTF-8 bytes of the text)", ".4f"),
}


@dataclass(frozen=True)
class Product:
    """What a program makes.

    folder: its name in `output_dir`; dtype: of the weights in the file; program and options: what was typed.
    introduction: says what it is, from `layers`, `width`, `parameters`, `trained`, `vocabulary`, `base`, `program`.
    use: how it is used; base: the model that it came from; save: writes the weights into a folder.
    """

    folder: str
    dtype: str
    program: str
    options: str
    introduction: str
    use: str
    base: str | None = None
    save: Callable[[RwkvTrainer, Path], None] = lambda trainer, folder: trainer.save_model(str(folder))


@dataclass
class CardArguments:
    """What the model card says that the run cannot know."""

    model_name: str = field(default="rwkv-4", metadata={"help": "title of the card"})
    license: str | None = field(default=None, metadata={"help": "of the weights, a Hub id"})
    language: list[str] = field(default_factory=list, metadata={"help": "ISO 639-1"})
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
    logged = {key: value for entry in state.log_history for key, value in entry.items()}
    precision = "bfloat16" if args.bf16 else "float16" if args.fp16 else "float32"
    rows = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    trained = sum(x.numel() for x in trainer.model.parameters() if x.requires_grad)
    facts = {
        "trained parameters": f"{trained:,}",
        "tokens seen": f"{state.num_input_tokens_seen:,}, padding not counted",
        "steps": f"{state.global_step:,} of {rows} rows",
        "epochs": f"{state.epoch:.2f}",
        "training text": "read as a stream",
    }
    if "wall_seconds" in logged:
        facts["wall time"] = f"{logged['wall_seconds'] / 60:.1f} minutes"
    if isinstance(data, PackedRows):
        facts["steps"] += f" x {data.block_size} tokens" if data.packing else " of one example"
        facts["training text"] = f"{len(data.tokens):,} tokens, {data.waste:.1%} of the rows is padding"
    medians = {key: median(values) for key in ("tokens_per_second", "mfu") if (values := _logged(state, key))}
    if "tokens_per_second" in medians:
        facts["speed"] = f"{medians['tokens_per_second']:,.0f} tokens/s, {logged['peak_memory']:.2f} GiB at the peak"
    if "mfu" in medians:
        facts["speed"] += f", {medians['mfu']:.1%} of the device's peak"
    return facts | {
        "hardware": hardware(),
        "software": software(),
        "precision": f"trained weights and optimizer in float32, matrix products in {precision}",
    }


def _logged(state: TrainerState, key: str) -> list[float]:
    return [entry[key] for entry in state.log_history if key in entry]


def card_text(
    trainer: RwkvTrainer,
    product: Product,
    metrics: Mapping[str, float],
    card_args: CardArguments,
    settings: Mapping[str, Any],
) -> str:
    """A model card with the front matter that the Hub reads; for the arguments see `save_result`."""
    measured = {key: metrics[f"eval_{key}"] for key in MEASURES if f"eval_{key}" in metrics}
    front_matter = ModelCardData(
        language=card_args.language or None,
        license=card_args.license,
        library_name="peft" if product.folder == "adapter" else "transformers",
        base_model=None if product.base is None or Path(product.base).exists() else product.base,
        pipeline_tag="text-generation",
        tags=["rwkv"],
        model_name=card_args.model_name if measured else None,
        eval_results=[_result(key, value) for key, value in measured.items() if key in ("loss", "bits_per_byte")][-1:],
    )
    model, config = trainer.model, trainer.model.config
    return CARD.format(
        front_matter=front_matter.to_yaml().strip(),
        name=card_args.model_name,
        introduction=product.introduction.format(
            layers=config.num_hidden_layers,
            width=config.hidden_size,
            vocabulary=config.vocab_size,
            parameters=sum(x.numel() for x in model.parameters()),
            trained=sum(x.numel() for x in model.parameters() if x.requires_grad),
            base=product.base,
            program=product.program,
        ),
        use=product.use,
        results=_results(trainer, product, measured),
        facts="\n".join(f"| {key} | {value} |" for key, value in run_facts(trainer).items()),
        command=f"{product.program} {product.options}",
        settings=yaml.safe_dump(dict(settings), sort_keys=False, width=96),
        sources="\n".join(f"- {source}" for source in card_args.data_sources) or "Not stated.",
    )


def _results(trainer: RwkvTrainer, product: Product, measured: Mapping[str, float]) -> str:
    """What was measured, and how, and the curves of it."""
    parts, data = ["Not measured."], trainer.eval_dataset
    if measured:
        rows = "\n".join(f"| {MEASURES[key][0]} | {value:{MEASURES[key][1]}} |" for key, value in measured.items())
        texts = data.learned is None or data.learned.all()
        parts = [RESULTS.format(rows=rows, dtype=product.dtype, length=data.block_size, cut=CUT if texts else ".")]
    if curves(trainer.state.log_history):
        parts.append("![training and validation loss](loss.png)")
    return "\n\n".join(parts)


def _result(measure: str, value: float) -> EvalResult:
    return EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name="validation text of the run",
        metric_type=measure,
        metric_value=round(value, 4),
    )


def curves(log_history: Sequence[Mapping[str, float]]) -> dict[str, list[tuple[float, float]]]:
    """Training and validation loss (nats per token) after so many million training tokens, where there are any."""
    found = {
        label: [(entry["num_input_tokens_seen"] / 1e6, entry[key]) for entry in log_history if key in entry]
        for key, label in (("loss", "training"), ("eval_loss", "validation"))
    }
    return {label: points for label, points in found.items() if points}


def plot_loss(
    points: Mapping[str, Sequence[tuple[float, float]]], path: Path, against: str = "training tokens (millions)"
) -> None:
    """Losses (nats per token) such as `curves` found, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    for label, curve in points.items():
        axes.plot(*zip(*curve, strict=True), marker=".", label=f"{label} ({curve[-1][1]:.3f})")
    axes.set(xlabel=against, ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def save_result(
    trainer: RwkvTrainer,
    product: Product,
    metrics: Mapping[str, float],
    card_args: CardArguments,
    settings: Mapping[str, Any],
) -> Path:
    """Write `output_dir/<folder>`, all of it or nothing: weights, tokenizer, card, curve. All processes call it.

    Args:
        metrics: of the final weights, as `trainer.evaluate` gives them, and `eval_loss_before` if it is known.
        settings: the options of the run, as its `--config` file would give them; paths are left out.

    Raises:
        FloatingPointError: a weight that is no number, or none in `product.dtype`.
    """
    trainer.stop_on_broken_weights()
    folder = Path(trainer.args.output_dir) / product.folder
    new = unfinished(folder)
    model, tokenizer = trainer.model, trainer.processing_class
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    model.config.use_cache = True  # the Trainer had switched it off
    if trainer.args.should_save:
        shutil.rmtree(new, ignore_errors=True)
        card = card_text(trainer, product, metrics, card_args, without_paths(settings))
    if product.folder == "model":
        model.to(getattr(torch, product.dtype))
    product.save(trainer, new)
    if trainer.args.should_save:
        (new / TRAINING_ARGS_NAME).unlink(missing_ok=True)  # a pickle, which nobody should have to trust
        if points := curves(trainer.state.log_history):
            plot_loss(points, new / "loss.png")
        (new / "README.md").write_text(card, encoding="utf-8")
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(new, folder)
    trainer.accelerator.wait_for_everyone()  # another process may load it at once
    return folder


def without_paths(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in PATHS}
