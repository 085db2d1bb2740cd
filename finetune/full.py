"""Fine-tune every parameter of an RWKV-4 on instructions, chats or texts.

    python -m rwkv_finetune.full --model RWKV/rwkv-4-169m-pile --train_file train.jsonl \
        --validation_share 0.1 --output_dir run/

    # the model in the box, on a CPU
    python -m rwkv_finetune.full --config finetune/instruct.yaml \
        --train_file instruction-data.json --learning_rate 1e-3 --output_dir run/

The same options, data and folder as rwkv_finetune.lora, but `output_dir/model` in place of an adapter: weights,
tokenizer, model card, loss.png. Weights and optimizer are in float32, 16 bytes a parameter with their gradients.
"""

from dataclasses import dataclass, field

import torch

from modeling_rwkv import demo_model_path
from rwkv_finetune.report import USE, Product
from rwkv_finetune.supervised import Method, SupervisedArguments, load_model
from rwkv_finetune.supervised import main as supervised
from rwkv_finetune.trainer import round_weights

INTRODUCTION = """\
An RWKV-4 language model, {layers} layers x {width} wide, {parameters:,} parameters, vocabulary
{vocabulary:,}: {base}, all of it fine-tuned with `{program}`."""


@dataclass
class FullArguments:
    """The model, and its file."""

    model: str = field(
        default_factory=lambda: str(demo_model_path()),
        metadata={"help": "folder or Hub id of the RWKV-4 to start from; default: the model in the box"},
    )
    save_dtype: str = field(
        default="bfloat16",
        metadata={"help": "of the result", "choices": ["float32", "bfloat16", "float16"]},
    )


@dataclass
class FullTrainingArguments(SupervisedArguments):
    # A model of 224 channels takes 1e-3 (finetune/instruct.yaml); wider ones take less, as with any Adam.
    learning_rate: float = field(default=1e-4, metadata={"help": "of matrices and time_mix"})


METHOD = Method(
    description="Fine-tune every parameter of an RWKV-4.",
    options=FullArguments,
    training=FullTrainingArguments,
    build=lambda options, args: load_model(options.model, args),
    finish=lambda model, options: round_weights(model, getattr(torch, options.save_dtype)),
    product=lambda options, program, typed: Product(
        "model", options.save_dtype, program, typed, INTRODUCTION, USE, options.model
    ),
)


def main(argv: list[str] | None = None, prog: str = "python -m rwkv_finetune.full") -> None:
    supervised(METHOD, argv, prog)


if __name__ == "__main__":
    main()
