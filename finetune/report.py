"""The model card and the loss curve of a run, from what the run itself recorded."""

import os
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml
from huggingface_hub import EvalResult, ModelCardData

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


def card_text(
    *,
    name: str,
    language: Sequence[str],
    license_id: str,
    data_sources: Sequence[str],
    config: transformers.PreTrainedConfig,
    parameters: int,
    dtype: str,
    block_size: int,
    metrics: Mapping[str, float],
    facts: Mapping[str, str],
    command: str,
    settings: Mapping[str, Any],
) -> str:
    """A model card with the front matter that the Hub reads; all numbers come from the caller.

    Args:
        metrics: `eval_loss`, `eval_perplexity` and `eval_bits_per_byte` of the final weights.
        facts: rows of the training table, name to value.
        settings: the options of the run, as its `--config` file would give them.
    """
    result = EvalResult(
        task_type="text-generation",
        dataset_type="text",
        dataset_name="validation text of the run",
        metric_type="bits_per_byte",
        metric_value=round(metrics["eval_bits_per_byte"], 4),
    )
    front_matter = ModelCardData(
        language=list(language),
        license=license_id,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["rwkv"],
        model_name=name,
        eval_results=[result],
    )
    return CARD.format(
        front_matter=front_matter.to_yaml().strip(),
        name=name,
        layers=config.num_hidden_layers,
        width=config.hidden_size,
        vocabulary=config.vocab_size,
        parameters=parameters,
        dtype=dtype,
        block_size=block_size,
        loss=metrics["eval_loss"],
        perplexity=metrics["eval_perplexity"],
        bits_per_byte=metrics["eval_bits_per_byte"],
        facts="\n".join(f"| {key} | {value} |" for key, value in facts.items()),
        command=command,
        settings=yaml.safe_dump(dict(settings), sort_keys=False, width=96),
        sources="\n".join(f"- {source}" for source in data_sources) or "Not stated.",
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
            axes.plot([t / 1e6 for t in tokens], losses, label=f"{label} ({losses[-1]:.3f})")
    axes.set(xlabel="training tokens (millions)", ylabel="loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)
