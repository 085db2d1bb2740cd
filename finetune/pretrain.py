"""Train an RWKV-4 from scratch on a text file, with the recipe of its paper.

    python -m rwkv_finetune.pretrain --config finetune/demo.yaml \
        --train_file train.txt --validation_file valid.txt --output_dir run/

    # a smaller one, on a CPU, to see it work
    python -m rwkv_finetune.pretrain --train_file train.txt --validation_file valid.txt \
        --output_dir tiny/ --num_hidden_layers 2 --hidden_size 64 --vocab_size 512 \
        --block_size 128 --per_device_train_batch_size 8 --max_steps 200

    # several processes: the same losses for the same number of rows in a step
    torchrun --nproc_per_node 8 -m rwkv_finetune.pretrain --config finetune/demo.yaml \
        --per_device_train_batch_size 4 --train_file ...

The files are UTF-8 text, documents separated by a line `<|endoftext|>`. Options are those below
and all of `transformers.TrainingArguments`; `--config` reads them from YAML, the command line
wins. The same command started again continues where it was, also after a kill at any moment.

output_dir/
    run.json            what the run was started with; a different recipe is refused
    tokenizer/          trained here unless --tokenizer names one
    checkpoint-*/       complete ones hold a file `complete`; others are ignored
    runs/               TensorBoard
    trainer_state.json  every logged number
    model/              the result: weights, tokenizer, README.md (model card), loss.png
"""

import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoTokenizer,
    PreTrainedTokenizerBase,
    TrainerState,
    TrainingArguments,
    default_data_collator,
    set_seed,
)
from transformers.trainer import TRAINER_STATE_NAME

from modeling_rwkv import RwkvConfig, RwkvForCausalLM
from rwkv_eval.documents import byte_count, read_documents
from rwkv_finetune.arguments import ProgramParser, Refusal, settings_of
from rwkv_finetune.packing import PackedRows, tokenize
from rwkv_finetune.report import CardArguments, save_result
from rwkv_finetune.run_folder import claim, complete_checkpoints, sha256
from rwkv_finetune.tokenizer import SMALLEST_VOCABULARY, save_tokenizer, train_tokenizer
from rwkv_finetune.trainer import RwkvTrainer, round_weights


@dataclass
class ModelArguments:
    """The shape of the model, and of its file."""

    num_hidden_layers: int = field(default=12, metadata={"help": "blocks"})
    hidden_size: int = field(default=768, metadata={"help": "width C"})
    intermediate_size: int | None = field(default=None, metadata={"help": "default: 4 C"})
    tie_word_embeddings: bool = field(default=False, metadata={"help": "one matrix for both"})
    save_dtype: str = field(
        default="bfloat16",
        metadata={"help": "of the result", "choices": ["float32", "bfloat16", "float16"]},
    )


@dataclass
class DataArguments:
    """The text, its tokens and its rows."""

    train_file: str = field(metadata={"help": "UTF-8 text to learn"})
    validation_file: str = field(metadata={"help": "UTF-8 text to measure on"})
    tokenizer: str | None = field(
        default=None, metadata={"help": "folder or Hub id; default: train one on train_file"}
    )
    vocab_size: int = field(default=4096, metadata={"help": "of the tokenizer trained here"})
    block_size: int = field(default=1024, metadata={"help": "tokens in a row"})
    start_every: int = field(
        default=2,
        metadata={"help": "begin every n-th training document with <|endoftext|>; 0: none"},
    )


@dataclass
class PretrainingArguments(TrainingArguments):
    """TrainingArguments with the paper's optimizer as default."""

    output_dir: str = field(metadata={"help": "folder to create, or to continue in"})
    learning_rate: float = field(default=6e-4, metadata={"help": "of matrices and time_mix"})
    adam_beta2: float = field(default=0.99, metadata={"help": "beta2 of Adam"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "cosine, linear, ..."})
    report_to: str = field(default="tensorboard", metadata={"help": "where curves go"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints to keep"})
    eval_strategy: str = field(default="steps", metadata={"help": "no, steps or epoch"})
    include_num_input_tokens_seen: str = field(default="non_padding", metadata={"help": "which tokens count as seen"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "hide a NaN loss"})
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "must stay false: rows leak without position_ids"}
    )
    logit_penalty: float = field(
        default=1e-4, metadata={"help": "weight of the penalty on each position's largest logit"}
    )

    def __post_init__(self) -> None:
        if not torch.accelerator.is_available():
            self.use_cpu = True  # without it, bf16 is refused on a CPU
        super().__post_init__()


# With the files' contents and the model's shape, what decides the weights that come out.
RECIPE = {
    *("learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "max_grad_norm"),
    *("num_train_epochs", "max_steps", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon"),
    *("optim", "logit_penalty", "seed", "data_seed", "bf16", "fp16"),
}
PATHS = {"train_file", "validation_file", "output_dir", "logging_dir", "resume_from_checkpoint"}


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    parser = ProgramParser(
        (ModelArguments, DataArguments, CardArguments, PretrainingArguments),
        prog="python -m rwkv_finetune.pretrain",
        description="Train an RWKV-4 from scratch on a text file.",
    )
    model_args, data_args, card_args, training_args = parser.parse(argv)
    command = shlex.join(["python", "-m", "rwkv_finetune.pretrain", *argv])
    try:
        run(model_args, data_args, card_args, training_args, command)
    except (Refusal, FloatingPointError, OSError) as error:
        parser.error(str(error))


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    card_args: CardArguments,
    training_args: PretrainingArguments,
    command: str,
) -> None:
    """From checked arguments to a finished `output_dir`; see the top of this file.

    Raises:
        Refusal: something that was asked for cannot be done.
    """
    check(model_args, data_args, training_args)
    training_args.dataloader_pin_memory &= torch.accelerator.is_available()
    documents, valid_documents = (read_all(path) for path in (data_args.train_file, data_args.validation_file))
    output_dir = Path(training_args.output_dir)
    tokenizer = load_tokenizer(data_args.tokenizer) if data_args.tokenizer else None
    with training_args.main_process_first(desc="output_dir and tokenizer"):
        claim(output_dir, recipe(model_args, data_args, training_args))
        if tokenizer is None:
            if not (output_dir / "tokenizer").exists():
                save_tokenizer(train_tokenizer(documents, data_args.vocab_size), output_dir / "tokenizer")
            tokenizer = load_tokenizer(output_dir / "tokenizer")

    train, valid = (
        PackedRows(tokenize(texts, tokenizer, every, name), data_args.block_size, tokenizer.pad_token_id)
        for texts, every, name in (
            (documents, data_args.start_every, "training text"),
            (valid_documents, 1, "validation text"),
        )
    )
    say = print if training_args.should_save else lambda text: None
    say(
        f"{len(documents):,} documents, {len(train.tokens):,} tokens in {len(train):,} rows of "
        f"{data_args.block_size}, {train.waste:.1%} padding"
    )
    set_seed(training_args.seed)
    config = RwkvConfig(
        vocab_size=len(tokenizer),
        context_length=data_args.block_size,
        num_hidden_layers=model_args.num_hidden_layers,
        hidden_size=model_args.hidden_size,
        intermediate_size=model_args.intermediate_size,
        tie_word_embeddings=model_args.tie_word_embeddings,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    trainer = RwkvTrainer(
        model=RwkvForCausalLM(config),
        args=training_args,
        train_dataset=train,
        eval_dataset=valid,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        logit_penalty=training_args.logit_penalty,
        validation_bytes=byte_count(valid_documents),
    )
    start = training_args.resume_from_checkpoint or newest_checkpoint(output_dir)
    if start:
        say(f"continuing from {start}")
    train_to_the_end(trainer, start)
    round_weights(trainer.model, getattr(torch, model_args.save_dtype))
    metrics = trainer.evaluate()
    trainer.save_state()
    if training_args.should_save:
        settings = settings_of(model_args, data_args, card_args, training_args)
        settings = {key: value for key, value in settings.items() if key not in PATHS}
        folder = save_result(trainer, model_args.save_dtype, metrics, card_args, settings, command)
        print(f"{folder}: {metrics['eval_bits_per_byte']:.4f} bits per byte")


def check(model_args: ModelArguments, data_args: DataArguments, args: PretrainingArguments) -> None:
    """Refuse, before anything is read or written, what cannot work."""
    smallest = {
        "num_hidden_layers": (model_args.num_hidden_layers, 1),
        "hidden_size": (model_args.hidden_size, 1),
        "block_size": (data_args.block_size, 2),
        "start_every": (data_args.start_every, 0),
        "per_device_train_batch_size": (args.per_device_train_batch_size, 1),
    }
    if data_args.tokenizer is None:
        smallest["vocab_size"] = (data_args.vocab_size, SMALLEST_VOCABULARY)
    for name, (value, least) in smallest.items():
        if value < least:
            raise Refusal(f"{name} is {value}; it must be at least {least}")
    if args.remove_unused_columns:
        raise Refusal("remove_unused_columns must be false: rows need their position_ids")
    if args.resume_from_checkpoint and not Path(args.resume_from_checkpoint).is_dir():
        raise Refusal(f"resume_from_checkpoint: there is no folder {args.resume_from_checkpoint}")


def read_all(path: str) -> list[str]:
    """All documents of a file."""
    try:
        return list(read_documents(path))
    except ValueError as error:
        raise Refusal(str(error)) from error


def recipe(model_args: ModelArguments, data_args: DataArguments, args: PretrainingArguments) -> dict[str, Any]:
    """Everything that decides the result: files by content, not by name."""
    rows = args.per_device_train_batch_size * args.gradient_accumulation_steps * args.world_size
    return {
        **asdict(model_args),
        **{key: value for key, value in asdict(data_args).items() if key not in PATHS},
        **{key: value for key, value in args.to_dict().items() if key in RECIPE},
        "rows_per_step": rows,
        "train_sha256": sha256(data_args.train_file),
        "validation_sha256": sha256(data_args.validation_file),
    }


def load_tokenizer(name: str | Path) -> PreTrainedTokenizerBase:
    """A tokenizer that can end a document and pad a row."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise Refusal(f"no tokenizer can be loaded from {name}; name a folder with tokenizer.json") from error
    if tokenizer.pad_token_id is None or tokenizer.eos_token_id is None:
        raise Refusal(f"the tokenizer in {name} needs an end-of-text and a padding token; give it both")
    return tokenizer


def newest_checkpoint(output_dir: Path) -> str | None:
    """The newest checkpoint that is complete."""
    checkpoints = complete_checkpoints(output_dir)
    return str(checkpoints[-1]) if checkpoints else None


def train_to_the_end(trainer: RwkvTrainer, start: str | None) -> None:
    """Train, from the checkpoint `start` if there is one."""
    if start:
        state = TrainerState.load_from_json(str(Path(start) / TRAINER_STATE_NAME))
        if state.global_step >= state.max_steps:  # the Trainer would take one more step
            trainer.state = state
            trainer._load_from_checkpoint(start)
            return
    trainer.train(resume_from_checkpoint=start)


if __name__ == "__main__":
    main()
