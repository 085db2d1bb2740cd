"""Fine-tune the state that an RWKV-4 begins with, and nothing else: as if it had read a text that nobody wrote.

    python -m rwkv_finetune.state --model RWKV/rwkv-4-169m-pile --train_file train.jsonl \
        --validation_share 0.1 --output_dir run/

    # the model in the box, on a CPU
    python -m rwkv_finetune.state --config finetune/instruct.yaml \
        --train_file instruction-data.json --output_dir run/

    # then
    rwkv generate "Name a color." --model modeling_rwkv/demo --state run/state/state.safetensors

For each block: what the two token shifts find before the first token, and the average over a past that never was,
with its weight: four numbers a channel, less than a thousandth of a model, at no cost afterwards. They take the place
of the empty state: `model.set_initial_state(FILE)` makes them a part of a model, for `generate`, `pipeline` and
evaluation; `RwkvCache.load(FILE)` is the same as `past_key_values` of one row.

The same options, data and folder as rwkv_finetune.lora, but `output_dir/state` in place of an adapter:
state.safetensors, tokenizer, model card, loss.png.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from modeling_rwkv import RwkvForCausalLM, demo_model_path
from modeling_rwkv.initial_state import FILE, WEIGHTLESS, RwkvInitialState
from rwkv_finetune.arguments import Refusal
from rwkv_finetune.report import Product
from rwkv_finetune.supervised import Method, SupervisedArguments, load_model
from rwkv_finetune.supervised import main as supervised
from rwkv_finetune.trainer import RwkvTrainer

# The logarithm of the weight of the past that training starts with, in the units of keys: of an average of zeros, so
# that the first tokens are halved rather than replaced. From 0, 2, 3 and 4 the instruction set ended at 4.45, 4.42,
# 4.38 and 4.37 nats per token (the model in the box, learning rates 0.3, 0.3, 0.6 and 0.3, three epochs).
WEIGHT = 4.0

INTRODUCTION = """\
A state for {base}, an RWKV-4 of {layers} layers x {width}, to begin with: {trained:,} trained numbers beside
{parameters:,}, by `{program}`."""

USE = """\
```python
import modeling_rwkv  # the RWKV classes for transformers' Auto classes
from transformers import pipeline

generate = pipeline("text-generation", model="MODEL")
generate.model.set_initial_state("PATH_OF_THIS_FOLDER/state.safetensors")
print(generate("Once upon a time", max_new_tokens=100, do_sample=True)[0]["generated_text"])
```"""


@dataclass
class StateArguments:
    """The model, and where its state starts from."""

    model: str = field(
        default_factory=lambda: str(demo_model_path()),
        metadata={"help": "folder or Hub id of the RWKV-4 to start from; default: the model in the box"},
    )
    state: str | None = field(
        default=None, metadata={"help": "file of a state to go on from; default: the model's own, or a new one"}
    )


@dataclass
class StateTrainingArguments(SupervisedArguments):
    learning_rate: float = field(default=0.3, metadata={"help": "of the state, whose numbers are large"})


def build(options: StateArguments, args: SupervisedArguments) -> RwkvForCausalLM:
    """The frozen model with a state that is trained, which is all that its checkpoints hold.

    Raises:
        Refusal: the state to go on from is missing, or no state, or of another model.
    """
    model = load_model(options.model, args, frozen=True).requires_grad_(False)
    if options.state is not None:
        try:
            model.set_initial_state(options.state)
        except (OSError, ValueError) as error:
            raise Refusal(f"state: {error}") from error
    elif model.base_model.initial_state is None:
        empty = RwkvInitialState(model.config)
        empty.set(None)
        model.set_initial_state(empty.cache())
    model.base_model.initial_state.requires_grad_(True)
    model._keys_to_ignore_on_save = {name for name in model.state_dict() if ".initial_state." not in name}
    return model


def begin(model: Any) -> None:
    """Give a state that is empty, of which nothing could be learned, a past of zeros."""
    weight = model.base_model.initial_state.weight
    with torch.no_grad():
        weight.add_((weight == WEIGHTLESS).float(), alpha=WEIGHT - WEIGHTLESS)


def save(trainer: RwkvTrainer, folder: Path) -> None:
    """Write the state, and the tokenizer that it was trained with."""
    if trainer.args.should_save:
        folder.mkdir(parents=True)
        trainer.model.base_model.initial_state.cache().save(folder / FILE, trainer.model)
        trainer.processing_class.save_pretrained(folder)


METHOD = Method(
    description="Fine-tune the state that an RWKV-4 begins with.",
    options=StateArguments,
    training=StateTrainingArguments,
    build=build,
    begin=begin,
    finish=lambda model, options: None,
    product=lambda options, program, typed: Product(
        "state", "float32", program, typed, INTRODUCTION, USE.replace("MODEL", options.model), options.model, save
    ),
)


def main(argv: list[str] | None = None, prog: str = "python -m rwkv_finetune.state") -> None:
    supervised(METHOD, argv, prog)


if __name__ == "__main__":
    main()
