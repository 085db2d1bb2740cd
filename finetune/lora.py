"""Fine-tune an RWKV-4 on instructions, chats or texts by LoRA: small matrices beside the frozen ones.

    python -m rwkv_finetune.lora --model RWKV/rwkv-4-169m-pile --train_file train.jsonl \
        --validation_share 0.1 --output_dir run/

    # the model in the box, on a CPU
    python -m rwkv_finetune.lora --config finetune/instruct.yaml \
        --train_file instruction-data.json --output_dir run/

    # a large model on one GPU: 4-bit weights, recomputed activations
    python -m rwkv_finetune.lora --model RWKV/rwkv-raven-7b --train_file train.jsonl --output_dir run/ \
        --load_in 4bit --bf16 true --gradient_checkpointing true

    # then
    rwkv merge run/adapter merged/

What is read, and what of it is learned: rwkv_finetune/examples.py. Options are those below and all of
`transformers.TrainingArguments`; `--config` reads them from YAML, the command line wins. The same command started
again continues where it was, also after a kill at any moment.

output_dir/
    run.json            what the run was started with; a different recipe is refused
    checkpoint-*/       complete ones hold a file `complete`; others are ignored
    runs/               TensorBoard
    trainer_state.json  every logged number
    adapter/            the result, in PEFT's format: adapter, tokenizer, README.md (model card), loss.png

An adapter loads with `peft.AutoPeftModelForCausalLM`, with `pipeline`, and beside others, between which
`set_adapter` switches. With --train_vectors the decay, bonus and mixing vectors of the model are trained in full and
saved in the adapter's file, but PEFT puts them into the model itself: load such an adapter alone.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModelForCausalLM, prepare_model_for_kbit_training
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file, save_file
from torch import nn

from modeling_rwkv import demo_model_path
from rwkv_finetune.arguments import Refusal
from rwkv_finetune.report import USE, Product
from rwkv_finetune.supervised import LIBRARIES, Method, SupervisedArguments, load_model
from rwkv_finetune.supervised import main as supervised

VECTORS = ("time_decay", "time_first", "time_mix_key", "time_mix_value", "time_mix_receptance")
INTRODUCTION = """\
A LoRA adapter of {base}, an RWKV-4 of {layers} layers x {width}: {trained:,} trained parameters of {parameters:,},
by `{program}`."""


@dataclass
class LoraArguments:
    """The model, and the matrices beside its own."""

    model: str = field(
        default_factory=lambda: str(demo_model_path()),
        metadata={"help": "folder or Hub id of the RWKV-4 to start from; default: the model in the box"},
    )
    # finetune/instruct.yaml on the model in the box, validation loss (before: 5.29): rank 4 3.18, 8 2.98, 16 2.82,
    # 64 2.62, in full 2.48. On attention alone 3.14. rsLoRA 2.78, which scales by 4 times as much; DoRA 2.82.
    rank: int = field(default=16, metadata={"help": "of the added matrices"})
    alpha: int = field(default=32, metadata={"help": "their product is scaled by alpha / rank"})
    dropout: float = field(default=0.0, metadata={"help": "of their inputs"})
    targets: list[str] = field(
        default_factory=lambda: [
            *(f"attention.{name}" for name in ("key", "value", "receptance", "output")),
            *(f"feed_forward.{name}" for name in ("key", "value", "receptance")),
        ],
        metadata={"help": "ends of the names of the matrices that get one"},
    )
    use_rslora: bool = field(default=False, metadata={"help": "scale by alpha / sqrt(rank) instead"})
    use_dora: bool = field(default=False, metadata={"help": "learn magnitudes apart from directions"})
    train_vectors: bool = field(default=False, metadata={"help": "train time_decay, time_first, time_mix_* too"})
    load_in: str | None = field(
        default=None,
        metadata={
            "help": "frozen weights in fewer bits: int8 by torchao, 8bit and 4bit by bitsandbytes on a GPU",
            "choices": [*LIBRARIES],
        },
    )


@dataclass
class LoraTrainingArguments(SupervisedArguments):
    # A model of 224 channels takes 5e-3 (finetune/instruct.yaml); wider ones take less, as with any Adam.
    learning_rate: float = field(default=1e-3, metadata={"help": "of the added matrices and time_mix"})


class AdaptedModel(PeftModelForCausalLM):
    """A PEFT model whose adapter files hold whatever is trained, parameters of the model itself included."""

    def save_pretrained(self, save_directory: str, *args: Any, **kwargs: Any) -> None:
        super().save_pretrained(save_directory, *args, **kwargs)
        file = Path(save_directory) / SAFETENSORS_WEIGHTS_NAME
        names = [name for name, x in self.named_parameters() if x.requires_grad and name.endswith(VECTORS)]
        if names and file.exists():  # one process writes it
            weights = kwargs.get("state_dict") or dict(self.named_parameters())
            vectors = {name: weights[name].detach().cpu().contiguous() for name in names}
            save_file(load_file(file) | vectors, file, metadata={"format": "pt"})


def adapted(model: nn.Module, options: LoraArguments) -> AdaptedModel:
    """`model` with an adapter, and with its own parameters frozen, but for the vectors if they are trained.

    Raises:
        Refusal: a target that no matrix of the model has, or a rank or dropout that cannot be.
    """
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Embedding)]
    for target in options.targets:
        if not any(f".{name}".endswith(f".{target}") for name in names):
            raise Refusal(f"targets: no matrix of the model ends in {target!r}; there are attention.key, head, ...")
    if options.rank < 1:
        raise Refusal(f"rank is {options.rank}; it must be at least 1")
    if not 0 <= options.dropout < 1:
        raise Refusal(f"dropout is {options.dropout}; it must be from 0 up to, but not, 1")
    config = LoraConfig(
        task_type="CAUSAL_LM",
        r=options.rank,
        lora_alpha=options.alpha,
        lora_dropout=options.dropout,
        target_modules=options.targets,
        use_rslora=options.use_rslora,
        use_dora=options.use_dora,
    )
    model = AdaptedModel(model, config)
    for name, x in model.named_parameters():
        if options.train_vectors and name.endswith(VECTORS):
            x.data = x.data.float()
            x.requires_grad_(True)
    return model


def build(options: LoraArguments, args: SupervisedArguments) -> AdaptedModel:
    """The frozen model in the dtype, or the bits, that it is asked for in; what is trained is in float32."""
    model = load_model(options.model, args, options.load_in, frozen=True, adapted=True)
    if getattr(model, "is_quantized", False):
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=args.gradient_checkpointing)
    return adapted(model, options)


METHOD = Method(
    description="Fine-tune an RWKV-4 by LoRA.",
    options=LoraArguments,
    training=LoraTrainingArguments,
    build=build,
    finish=lambda model, options: None,
    product=lambda options, program, typed: Product(
        "adapter", "float32", program, typed, INTRODUCTION, USE, options.model
    ),
)


def main(argv: list[str] | None = None, prog: str = "python -m rwkv_finetune.lora") -> None:
    supervised(METHOD, argv, prog)


if __name__ == "__main__":
    main()
