"""Go on training an RWKV-4 on longer and longer rows, as its paper does: 2,048, then 4,096, then 8,192 tokens.

    python -m rwkv_finetune.extend_context --model RWKV/rwkv-4-169m-pile --train_file books.jsonl \
        --validation_file held-out.jsonl --max_steps 1000 --bf16 true --output_dir run/

    # rows of any length in the memory of 1,024 tokens
    python -m rwkv_finetune.extend_context --model RWKV/rwkv-4-169m-pile --train_file books.jsonl \
        --validation_share 0.01 --context_lengths 65536 --chunk_length 1024 --max_steps 1000 --output_dir run/

    # the model in the box, on a CPU, on stories that are read one after the other
    python -m rwkv_finetune.extend_context --train_file train.txt \
        --validation_file valid.txt --context_lengths 2048 4096 --join_documents true \
        --max_steps 20 --per_device_train_batch_size 1 --output_dir run/

With --chunk_length a row is read so many tokens at a time, forwards and backwards, in the memory of these: see
modeling_rwkv/chunks.py for what little grows with the row. --carry_gradients false cuts the gradient there (truncated
backpropagation through time); otherwise gradients are those of the whole row. Every step has as many tokens, whatever
the length of its rows: per_device_train_batch_size counts the longest ones. max_steps and num_train_epochs are of each
length.

What is read: rwkv_finetune/examples.py. Options are those below and all of `transformers.TrainingArguments`;
`--config` reads them from YAML, the command line wins. The same command started again continues where it was.

output_dir/
    2048/, 4096/, ...   a run for each length, as of rwkv_finetune.full, each with its result in model/
    context.json        test loss by position and by length of context, of the model before and after each
    context.png         the same, drawn
"""

import copy
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase, set_seed

from modeling_rwkv import demo_model_path
from rwkv_finetune.arguments import ProgramParser, Refusal, settings_of
from rwkv_finetune.context import load_losses, measure, save_losses
from rwkv_finetune.data import Data, DataArguments, load_data
from rwkv_finetune.packing import PackedRows, TokenStream
from rwkv_finetune.report import USE, CardArguments, Product, save_result
from rwkv_finetune.run import load_tokenizer, printer, recipe, train_to_the_end
from rwkv_finetune.run_folder import claim
from rwkv_finetune.supervised import SupervisedArguments, check, load_model
from rwkv_finetune.trainer import RwkvTrainer, round_weights

INTRODUCTION = """\
An RWKV-4 language model, {layers} layers x {width} wide, {parameters:,} parameters, vocabulary
{vocabulary:,}: {base}, trained on rows of """


@dataclass
class ContextArguments:
    """The model, and the rows that it is to get used to."""

    model: str = field(
        default_factory=lambda: str(demo_model_path()),
        metadata={"help": "folder or Hub id of the RWKV-4 to start from; default: the model in the box"},
    )
    context_lengths: list[int] = field(
        default_factory=lambda: [2048, 4096, 8192], metadata={"help": "tokens in a row, one length after the other"}
    )
    join_documents: bool = field(
        default=False, metadata={"help": "read documents one after the other, as if they were one"}
    )
    chunk_length: int | None = field(
        default=None, metadata={"help": "tokens to read at a time; default: the whole row"}
    )
    carry_gradients: bool = field(default=True, metadata={"help": "from a chunk to those before it"})
    save_dtype: str = field(
        default="bfloat16", metadata={"help": "of the results", "choices": ["float32", "bfloat16", "float16"]}
    )

    def reading(self) -> dict[str, Any] | None:
        """How the model is to read a row; None: whole."""
        if self.chunk_length is None:
            return None
        return {"chunk_length": self.chunk_length, "carry_gradients": self.carry_gradients}


@dataclass
class ContextTrainingArguments(SupervisedArguments):
    learning_rate: float = field(default=1e-4, metadata={"help": "of matrices and time_mix"})
    per_device_train_batch_size: int = field(default=1, metadata={"help": "rows of the longest length"})


def main(argv: list[str] | None = None, prog: str = "python -m rwkv_finetune.extend_context") -> None:
    groups = (ContextArguments, DataArguments, CardArguments, ContextTrainingArguments)
    ProgramParser(groups, prog=prog, description="Train an RWKV-4 on longer rows.").run(argv, run)


def run(
    options: ContextArguments,
    data_args: DataArguments,
    card_args: CardArguments,
    args: ContextTrainingArguments,
    program: str,
    typed: str,
) -> None:
    """From parsed arguments to a run for each length in `output_dir`.

    Raises:
        Refusal: something that was asked for cannot be done.
    """
    check_options(options, data_args, args)
    tokenizer = load_tokenizer(options.model, load_model(options.model, args).config.vocab_size)
    data = load_data(replace(data_args, context_length=options.context_lengths[-1]), tokenizer, args.seed)
    data.warn()
    settings = settings_of(options, data_args, card_args, args)
    course = Course(options, args, card_args, settings, tokenizer, data, program, typed)
    course.check()
    with args.main_process_first(local=False, desc="output_dir"):
        claim(Path(args.output_dir), recipe(args, options, data_args))
    model = options.model
    course.measure(model, "as it was")
    for length in options.context_lengths:
        model = course.train(model, length)
        course.measure(model, f"{length:,} tokens")


def check_options(options: ContextArguments, data_args: DataArguments, args: ContextTrainingArguments) -> None:
    """Refuse what cannot work."""
    lengths = options.context_lengths
    if lengths != sorted(set(lengths)) or min(lengths, default=0) < 2 or any(lengths[-1] % n for n in lengths):
        raise Refusal(f"context_lengths are {lengths}; they must be 2 or more, rise, and divide the last one")
    if options.chunk_length is not None and options.chunk_length < 1:
        raise Refusal(f"chunk_length is {options.chunk_length}; it must be at least 1")
    for name in ("logit_penalty", "label_smoothing_factor"):
        if options.chunk_length and getattr(args, name):
            raise Refusal(f"{name} needs all logits at once; it must be 0 with a chunk_length")
    if data_args.streaming or not data_args.packing:
        raise Refusal("streaming and unpacked rows are not possible here: rows are made anew for each length")
    if data_args.context_length != DataArguments(train_file="").context_length:
        raise Refusal(f"context_length is {data_args.context_length}; here it is context_lengths that counts")
    check(data_args, args)


@dataclass
class Course:
    """The runs of one program, one length after the other."""

    options: ContextArguments
    args: ContextTrainingArguments
    card_args: CardArguments
    settings: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    data: Data
    program: str
    typed: str

    def __post_init__(self) -> None:
        self.output_dir, self.say = Path(self.args.output_dir), printer(self.args)
        self.learned, self.tested = (self._stream(rows) for rows in (self.data.train, self.data.validation))

    def check(self) -> None:
        """Refuse texts in which there is nothing as long as the rows."""
        longest = self.options.context_lengths[-1]
        for name, stream in (("train_file", self.learned), ("the validation text", self.tested)):
            if stream is not None and (length := int((stream.offsets[1:] - stream.offsets[:-1]).max())) < longest:
                raise Refusal(
                    f"context_lengths: no document of {name} has {longest:,} tokens, the longest has {length:,}; "
                    "give longer ones, or --join_documents true"
                )

    def train(self, base: str, length: int) -> str:
        """Train the model in the folder `base` on rows of `length` tokens; the folder of the result."""
        folder = self.output_dir / str(length)
        if (folder / "model").exists():
            return str(folder / "model")
        folder.mkdir(exist_ok=True)
        args = copy.copy(self.args)
        args.output_dir, args.logging_dir = str(folder), None
        args.per_device_train_batch_size *= self.options.context_lengths[-1] // length
        self.say(f"rows of {length:,} tokens, {args.per_device_train_batch_size} at a time")
        set_seed(args.seed)
        model = load_model(base, args)
        trainer = RwkvTrainer(
            model=model,
            args=args,
            train_dataset=self._rows(self.learned, length),
            eval_dataset=self._rows(self.tested, length),
            data_collator=self.data.collate,
            processing_class=self.tokenizer,
            logit_penalty=args.logit_penalty,
            reading=self.options.reading(),
        )
        train_to_the_end(trainer, self.say)
        model.config.context_length = length
        round_weights(model, getattr(torch, self.options.save_dtype))
        metrics = trainer.evaluate() if self.tested else {}
        trainer.save_state()
        introduction = f"{INTRODUCTION}{length:,} tokens with `{{program}}`."
        product = Product("model", self.options.save_dtype, self.program, self.typed, introduction, USE, base)
        return str(save_result(trainer, product, metrics, self.card_args, self.settings))

    def measure(self, base: str, name: str) -> None:
        """Add the losses of the model in the folder `base` to those in `output_dir`, unless they are there.

        One process measures while others wait, for `--ddp_timeout` seconds at most.
        """
        with self.args.main_process_first(local=False, desc=f"measuring {name}"):
            losses = load_losses(self.output_dir)
            if self.tested is None or name in losses:
                return
            model = load_model(base, self.args).to(self.args.device)
            longest = self.options.context_lengths[-1]
            lengths = {length for i in range(7, 32) if (length := 2**i) < longest} | set(self.options.context_lengths)
            losses[name] = measure(model, self.tested, sorted(lengths), self.tokenizer.pad_token_id, name)
            save_losses(losses, self.output_dir)
        self.say(f"{name}: {losses[name].by_length[longest]:.4f} nats per token in a context of {longest:,}")

    def _stream(self, rows: Any) -> TokenStream | None:
        """The documents of `rows`, or one of them all."""
        if rows is None:
            return None
        stream: TokenStream = rows.stream
        return replace(stream, offsets=stream.offsets[[0, -1]]) if self.options.join_documents else stream

    def _rows(self, stream: TokenStream | None, length: int) -> PackedRows | None:
        return None if stream is None else PackedRows(stream, length, self.tokenizer.pad_token_id)


if __name__ == "__main__":
    main()
