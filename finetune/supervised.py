"""The run that the supervised programs share: a model of the Hub or of a folder, and examples to learn from.

A program gives its own options, a way to make a model trainable, and what comes out: see `Method`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME as ADAPTER
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    IntervalStrategy,
    PreTrainedModel,
    TorchAoConfig,
    TrainerCallback,
    TrainerState,
    set_seed,
)

from modeling_rwkv import RwkvConfig
from modeling_rwkv.initial_state import FILE as STATE
from rwkv_finetune.arguments import ProgramParser, Refusal, settings_of
from rwkv_finetune.data import Data, DataArguments, load_data
from rwkv_finetune.packing import PackedRows
from rwkv_finetune.report import CardArguments, Product, save_result
from rwkv_finetune.run import RunArguments, load_tokenizer, prepare, printer, recipe, train_to_the_end
from rwkv_finetune.run_folder import claim
from rwkv_finetune.sources import UNREADABLE, unreadable
from rwkv_finetune.trainer import RwkvTrainer

LIBRARIES = {"int8": "torchao", "8bit": "bitsandbytes", "4bit": "bitsandbytes"}


@dataclass
class SupervisedArguments(RunArguments):
    """Measure every epoch, and keep the best."""

    warmup_steps: float = field(default=0.03, metadata={"help": "steps, or below 1 their share, of rising rates"})
    eval_strategy: str = field(default="epoch", metadata={"help": "no, steps or epoch; a stream has steps only"})
    save_strategy: str | None = field(default=None, metadata={"help": "likewise; default: as often as is measured"})
    eval_on_start: bool = field(default=True, metadata={"help": "measure before the first step"})
    load_best_model_at_end: bool | None = field(
        default=None,
        metadata={"help": "the result is the best, not the last; default: if every checkpoint is measured"},
    )
    logging_steps: float = field(default=10, metadata={"help": "steps between two lines of the log"})

    def __post_init__(self) -> None:
        if self.save_strategy is None:
            self.save_strategy = "epoch" if self.eval_strategy == "no" else self.eval_strategy
        if self.load_best_model_at_end is None:
            self.load_best_model_at_end = self.eval_strategy != "no" and self._measures_checkpoints()
        super().__post_init__()

    def _measures_checkpoints(self) -> bool:
        """The Trainer does not keep the best of checkpoints that it has not measured: it refuses to start."""
        if self.save_strategy == "steps" == self.eval_strategy:
            return self.save_steps % (self.eval_steps or self.logging_steps or math.inf) == 0
        return self.save_strategy in ("best", self.eval_strategy)


class HasModel(Protocol):
    """The options of a program: dataclasses with this field, among others."""

    model: str


Options = TypeVar("Options", bound=HasModel)


@dataclass(frozen=True)
class Method(Generic[Options]):
    """A way of fine-tuning.

    options: its dataclass, with a field `model`; training: its SupervisedArguments.
    build: the model to train, from both; finish: what is done to it before it is measured and saved.
    begin: what is done to it between its first measurement, as it came, and the first step.
    product: what comes out, from the options and (program, options) as they were typed.
    """

    description: str
    options: type[Options]
    training: type[SupervisedArguments]
    build: Callable[[Options, SupervisedArguments], PreTrainedModel | PeftModel]
    finish: Callable[[torch.nn.Module, Options], None]
    product: Callable[[Options, str, str], Product]
    begin: Callable[[torch.nn.Module], None] = lambda model: None


class Beginning(TrainerCallback):
    """Calls `begin` once in a run; one that is continued has begun."""

    def __init__(self, begin: Callable[[torch.nn.Module], None]):
        self.begin = begin

    def on_epoch_begin(self, args: Any, state: TrainerState, control: Any, **kwargs: Any) -> None:
        if state.global_step == 0:
            self.begin(kwargs["model"])


def main(method: Method[Any], argv: list[str] | None, prog: str) -> None:
    """Parse, run, and say in one sentence what is wrong."""
    groups = (method.options, DataArguments, CardArguments, method.training)
    ProgramParser(groups, prog=prog, description=method.description).run(argv, partial(run, method))


def run(
    method: Method[Options],
    options: Options,
    data_args: DataArguments,
    card_args: CardArguments,
    args: SupervisedArguments,
    program: str,
    typed: str,
) -> None:
    """From parsed arguments to a finished `output_dir`.

    Raises:
        Refusal: something that was asked for cannot be done.
    """
    check(data_args, args)
    say = printer(args)
    set_seed(args.seed)
    model = method.build(options, args)
    tokenizer = load_tokenizer(options.model, model.config.vocab_size)
    data = load_data(data_args, tokenizer, args.seed)
    _say_data(data, data_args, say)
    with args.main_process_first(local=False, desc="output_dir"):
        claim(Path(args.output_dir), recipe(args, options, data_args))
    trainer = RwkvTrainer(
        model=model,
        args=args,
        train_dataset=data.train,
        eval_dataset=data.validation,
        data_collator=data.collate,
        processing_class=tokenizer,
        logit_penalty=args.logit_penalty,
        callbacks=[Beginning(method.begin)],
    )
    try:
        train_to_the_end(trainer, say)
    except UNREADABLE as error:  # of a stream
        raise unreadable(data_args.train_file, error) from error
    method.finish(trainer.model, options)
    metrics = trainer.evaluate() if data.validation else {}
    trainer.save_state()
    history = trainer.state.log_history
    before = next((entry["eval_loss"] for entry in history if entry["step"] == 0 and "eval_loss" in entry), None)
    if before is not None:
        metrics["eval_loss_before"] = before
    product = method.product(options, program, typed)
    folder = save_result(trainer, product, metrics, card_args, settings_of(options, data_args, card_args, args))
    if data_args.streaming:
        data.warn()
    if metrics:
        say(f"{folder}: validation loss {metrics['eval_loss']:.4f}" + (f", {before:.4f} before" if before else ""))


def check(data_args: DataArguments, args: SupervisedArguments) -> None:
    """Refuse what cannot work; measure and save at steps where there are no epochs, nothing where there is no set."""
    if not 0 <= data_args.validation_share < 1:
        raise Refusal(f"validation_share is {data_args.validation_share}; it must be from 0 up to, but not, 1")
    prepare(args, {"context_length": (data_args.context_length, 2)})
    if data_args.streaming:
        if args.max_steps < 1:
            raise Refusal("a stream has no end: say with --max_steps how long to train")
        if data_args.validation_share and not data_args.validation_file:
            raise Refusal("no share of a stream can be held out; name a validation_file")
        for name in ("eval", "save"):
            if getattr(args, f"{name}_strategy") == "epoch":
                setattr(args, f"{name}_strategy", IntervalStrategy.STEPS)
                setattr(args, f"{name}_steps", args.eval_steps or args.save_steps)
    if not data_args.validation_file and not data_args.validation_share:
        args.eval_strategy = IntervalStrategy.NO
        args.load_best_model_at_end = args.eval_on_start = False


def load_model(
    name: str,
    args: SupervisedArguments,
    load_in: str | None = None,
    frozen: bool = False,
    adapted: bool = False,
) -> PreTrainedModel:
    """An RWKV of a folder or of the Hub: in float32, or, where it is frozen and products are in bfloat16, in that.

    One that was saved quantized stays as it is; adapters alone can be trained on it, which ``adapted`` promises.

    Raises:
        Refusal: there is none, or what there is is no RWKV-4, or cannot be trained so.
    """
    if (Path(name) / ADAPTER).exists():
        raise Refusal(f"model {name} is an adapter; make a model of it first: rwkv merge {name} OUT")
    if (Path(name) / STATE).exists():
        raise Refusal(f"model {name} is a state; name its model, and give the state to rwkv finetune state --state")
    name = str(Path(name).resolve()) if Path(name).is_dir() else name
    try:
        config = AutoConfig.from_pretrained(name)
        if not isinstance(config, RwkvConfig):
            raise Refusal(f"{name} is a model of the type {config.model_type}; these programs train rwkv")
        quantized = getattr(config, "quantization_config", None) or {}
        _check_quantization(name, quantized.get("quant_method"), load_in, adapted, args)
        dtype = torch.bfloat16 if frozen and args.bf16 else torch.float32
        given: dict[str, Any] = {"dtype": "auto" if quantized else dtype}
        if load_in:  # as None, it would hide that a model was saved quantized
            given["quantization_config"] = _quantization(load_in, dtype)
        model = AutoModelForCausalLM.from_pretrained(name, **given)
    except (OSError, ValueError) as error:
        raise Refusal(f"no model can be loaded from {name}: {error}") from error
    except ImportError as error:
        raise Refusal(
            f"quantized weights need torchao or bitsandbytes: pip install modeling-rwkv[quantize] ({error})"
        ) from error
    if quantized and not model.hf_quantizer.is_trainable:
        raise Refusal(f"transformers and peft train no adapter beside the weights of {name}: quantize them to 8 bits")
    return model


def _check_quantization(
    name: str, library: str | None, load_in: str | None, adapted: bool, args: SupervisedArguments
) -> None:
    """Refuse what cannot be trained, of a model that ``library`` quantized, or is asked to.

    On a CPU bitsandbytes 0.50 rounds inputs of 8-bit matrices to 8 bits in an evaluation, and not in training; and it
    repacks matrices of 4 bits in an evaluation, and then gives wrong gradients. DDP and FSDP2 stop at the tensors of
    torchao 0.18.
    """
    if library and not adapted:
        raise Refusal(f"model {name} is quantized: only an adapter can be trained on it, by rwkv finetune lora")
    if library and load_in:
        raise Refusal(f"load_in is {load_in}, but {name} is quantized already; leave load_in out")
    library = library or LIBRARIES.get(load_in or "")
    if library == "bitsandbytes" and not torch.accelerator.is_available():
        raise Refusal("weights of bitsandbytes need a GPU: on a CPU they train and evaluate differently; use int8")
    if library == "torchao" and args.world_size > 1:
        raise Refusal(f"weights of torchao train in one process, and there are {args.world_size}; use 8bit or 4bit")


def _quantization(load_in: str, dtype: torch.dtype) -> TorchAoConfig | BitsAndBytesConfig:
    if load_in == "int8":
        from torchao.quantization import Int8WeightOnlyConfig

        return TorchAoConfig(Int8WeightOnlyConfig())
    if load_in == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )


def _say_data(data: Data, args: DataArguments, say: Callable[[str], None]) -> None:
    if not isinstance(data.train, PackedRows):
        say(f"{args.train_file}: read as a stream")
        return
    data.warn()
    rows = f"{len(data.train):,} rows of {args.context_length}" if args.packing else f"{len(data.train):,} rows"
    held_out = f", {len(data.validation):,} rows to measure on" if data.validation else ""
    learned = 1 if data.train.learned is None else data.train.learned.mean()
    say(f"{len(data.train.tokens):,} tokens, {learned:.0%} of them learned, in {rows}{held_out}")
