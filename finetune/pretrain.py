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

from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, default_data_collator, set_seed

from modeling_rwkv import RwkvConfig, RwkvForCausalLM
from rwkv_eval.documents import byte_count, read_documents
from rwkv_finetune.arguments import ProgramParser, Refusal, settings_of
from rwkv_finetune.packing import PackedRows, tokenize
from rwkv_finetune.report import USE, CardArguments, Product, save_result
from rwkv_finetune.run import RunArguments, load_tokenizer, prepare, printer, recipe, train_to_the_end
from rwkv_finetune.run_folder import claim
from rwkv_finetune.tokenizer import SMALLEST_VOCABULARY, save_tokenizer, train_tokenizer
from rwkv_finetune.trainer import RwkvTrainer, round_weights

INTRODUCTION = """\
An RWKV-4 language model, {layers} layers x {width} wide, {parameters:,} parameters, vocabulary
{vocabulary:,}, trained from scratch with `{program}`."""


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
class PretrainingArguments(RunArguments):
    """The recipe of the paper."""

    learning_rate: float = field(default=6e-4, metadata={"help": "of matrices and time_mix"})
    eval_strategy: str = field(default="steps", metadata={"help": "no, steps or epoch"})
    logit_penalty: float = field(
        default=1e-4, metadata={"help": "weight of the penalty on each position's largest logit"}
    )


def main(argv: list[str] | None = None, prog: str = "python -m rwkv_finetune.pretrain") -> None:
    groups = (ModelArguments, DataArguments, CardArguments, PretrainingArguments)
    ProgramParser(groups, prog=prog, description="Train an RWKV-4 from scratch on a text file.").run(argv, run)


def run(
    model_args: ModelArguments,
    data_args: DataArguments,
    card_args: CardArguments,
    training_args: PretrainingArguments,
    program: str,
    options: str,
) -> None:
    """From checked arguments to a finished `output_dir`; see the top of this file.

    Raises:
        Refusal: something that was asked for cannot be done.
    """
    prepare(training_args, smallest(model_args, data_args))
    documents, valid_documents = (read_all(path) for path in (data_args.train_file, data_args.validation_file))
    own = Path(training_args.output_dir) / "tokenizer"
    with training_args.main_process_first(local=False, desc="output_dir and tokenizer"):
        if data_args.tokenizer or own.exists():
            tokenizer = load_tokenizer(data_args.tokenizer or own)
        else:
            tokenizer = train_tokenizer(documents, data_args.vocab_size)
        set_seed(training_args.seed)
        model = build(model_args, data_args, tokenizer)
        claim(own.parent, recipe(training_args, model_args, data_args))
        if not data_args.tokenizer and not own.exists():
            save_tokenizer(tokenizer, own)

    train, valid = (
        PackedRows(tokenize(texts, tokenizer, every, name), data_args.block_size, tokenizer.pad_token_id)
        for texts, every, name in (
            (documents, data_args.start_every, "training text"),
            (valid_documents, 1, "validation text"),
        )
    )
    say = printer(training_args)
    say(
        f"{len(documents):,} documents, {len(train.tokens):,} tokens in {len(train):,} rows of "
        f"{data_args.block_size}, {train.waste:.1%} padding"
    )
    trainer = RwkvTrainer(
        model=model,
        args=training_args,
        train_dataset=train,
        eval_dataset=valid,
        data_collator=default_data_collator,
        processing_class=tokenizer,
        logit_penalty=training_args.logit_penalty,
        validation_bytes=byte_count(valid_documents),
    )
    train_to_the_end(trainer, say)
    round_weights(trainer.model, getattr(torch, model_args.save_dtype))
    metrics = trainer.evaluate()
    trainer.save_state()
    product = Product("model", model_args.save_dtype, program, options, INTRODUCTION, USE)
    settings = settings_of(model_args, data_args, card_args, training_args)
    folder = save_result(trainer, product, metrics, card_args, settings)
    say(f"{folder}: {metrics['eval_bits_per_byte']:.4f} bits per byte")


def build(model_args: ModelArguments, data_args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> RwkvForCausalLM:
    """The model as training begins with it.

    Raises:
        Refusal: there is no model of such sizes, or no memory for it.
    """
    try:
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
        return RwkvForCausalLM(config)
    except (ValueError, RuntimeError, MemoryError) as error:  # what PyTorch raises where memory ends is the second
        raise Refusal(f"no model of these sizes can be built: {error}; choose others") from error


def smallest(model_args: ModelArguments, data_args: DataArguments) -> dict[str, tuple[float, float]]:
    """Options that have a least value: name to both."""
    values: dict[str, tuple[float, float]] = {
        "num_hidden_layers": (model_args.num_hidden_layers, 1),
        "hidden_size": (model_args.hidden_size, 1),
        "block_size": (data_args.block_size, 2),
        "start_every": (data_args.start_every, 0),
    }
    if data_args.tokenizer is None:
        values["vocab_size"] = (data_args.vocab_size, SMALLEST_VOCABULARY)
    return values


def read_all(path: str) -> list[str]:
    """All documents of a file."""
    try:
        return list(read_documents(path))
    except ValueError as error:
        raise Refusal(str(error)) from error


if __name__ == "__main__":
    main()
