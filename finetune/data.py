"""What the supervised programs train on: options, and the rows that they name.

A row is `input_ids`, `labels` and, packed, `position_ids` (packing.py); labels are -100 where nothing is learned.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import datasets
from transformers import DataCollatorForSeq2Seq, PreTrainedTokenizerBase, default_data_collator

from rwkv_finetune.arguments import Refusal
from rwkv_finetune.examples import Encoder, find_format
from rwkv_finetune.packing import IGNORED, PackedRows, TokenStream
from rwkv_finetune.sources import open_source

WINDOW = 1000  # examples of a stream that are shuffled, and packed, together


@dataclass
class DataArguments:
    """The examples, and how they become rows."""

    train_file: str = field(metadata={"help": "JSONL, JSON, CSV, Parquet or .txt file, folder of them, or Hub id"})
    validation_file: str | None = field(default=None, metadata={"help": "the same, to measure on"})
    validation_share: float = field(
        default=0.0, metadata={"help": "share of train_file to hold out for measuring, if there is no validation_file"}
    )
    columns: list[str] = field(
        default_factory=list,
        metadata={"help": "part=column for sets with other names, such as prompt=question completion=answer"},
    )
    subset: str | None = field(default=None, metadata={"help": "of a Hub data set that has several"})
    train_split: str = field(default="train", metadata={"help": "of a folder or Hub data set"})
    validation_split: str = field(default="validation", metadata={"help": "of validation_file, likewise"})
    context_length: int = field(
        default=1024, metadata={"help": "tokens in a row; longer answers are cut, longer texts go on in another row"}
    )
    packing: bool = field(default=True, metadata={"help": "several examples in a row, which do not see each other"})
    streaming: bool = field(
        default=False, metadata={"help": "read train_file as it is needed, over and over; needs max_steps"}
    )


@dataclass(frozen=True)
class Data:
    """Rows of a run. `warn` says what was lost on the way; of a stream it knows at the end."""

    train: PackedRows | datasets.IterableDataset
    validation: PackedRows | None
    collate: Callable[[list[Any]], Mapping[str, Any]]
    warn: Callable[[], None]


def load_data(args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int) -> Data:
    """The rows that `args` names.

    Raises:
        Refusal: a set that is empty or wrong: which row, which column, what was expected.
    """
    encoder = _encoder(args.train_file, args.train_split, args, tokenizer, args.streaming)
    validation = None
    if args.streaming:
        train = _stream(encoder, args, tokenizer, seed)
    else:
        table = _encode(encoder)
        if args.validation_share and not args.validation_file:
            table, held_out = _split(table, args, seed)
            validation = _rows(TokenStream.of(held_out), args, tokenizer)
        train = _rows(TokenStream.of(table), args, tokenizer)
    if args.validation_file:
        other = _encoder(args.validation_file, args.validation_split, args, tokenizer, False)
        validation = _rows(TokenStream.of(_encode(other)), args, tokenizer)
        other.warn()
    pad = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=IGNORED)
    return Data(train, validation, default_data_collator if args.packing else pad, encoder.warn)


def _encoder(
    name: str, split: str, args: DataArguments, tokenizer: PreTrainedTokenizerBase, streaming: bool
) -> Encoder:
    source = open_source(name, split, args.subset, streaming)
    try:
        return Encoder(source, find_format(source.columns, args.columns), tokenizer, args.context_length)
    except Refusal as error:
        raise Refusal(f"{name}: {error}") from error


def _encode(encoder: Encoder) -> datasets.Dataset:
    name, rows = encoder.source.name, encoder.source.rows
    table = rows.map(
        encoder,
        batched=True,
        with_indices=True,
        remove_columns=rows.column_names,
        desc=f"Tokenizing {name}",
        keep_in_memory=True,
        load_from_cache_file=False,
    )
    if not len(table):
        encoder.warn()
        raise Refusal(f"{name} holds nothing to learn in the first {encoder.context_length} tokens of any example")
    return table


def _split(table: datasets.Dataset, args: DataArguments, seed: int) -> tuple[datasets.Dataset, datasets.Dataset]:
    held_out = round(len(table) * args.validation_share)
    if not 0 < held_out < len(table):
        raise Refusal(
            f"validation_share is {args.validation_share}, {held_out} of {len(table)} examples; "
            "leave some to train and some to measure on"
        )
    parts = table.train_test_split(test_size=held_out, seed=seed, keep_in_memory=True)
    return parts["train"].flatten_indices(keep_in_memory=True), parts["test"].flatten_indices(keep_in_memory=True)


def _rows(stream: TokenStream, args: DataArguments, tokenizer: PreTrainedTokenizerBase) -> PackedRows:
    return PackedRows(stream, args.context_length, tokenizer.pad_token_id, args.packing)


def _stream(
    encoder: Encoder, args: DataArguments, tokenizer: PreTrainedTokenizerBase, seed: int
) -> datasets.IterableDataset:
    """Rows without end: encoded, shuffled within a window, packed within a window, and again."""

    def to_rows(batch: dict[str, list]) -> dict[str, list]:
        stream = TokenStream.of(datasets.Dataset.from_dict(dict(batch)))
        packed = _rows(stream, args, tokenizer)
        rows = [packed[i] for i in range(len(packed))]
        return {name: [list(map(int, row[name])) for row in rows] for name in rows[0]}

    rows = encoder.source.rows.map(encoder, batched=True, with_indices=True, remove_columns=encoder.source.columns)
    rows = rows.shuffle(seed=seed, buffer_size=WINDOW)
    rows = rows.map(to_rows, batched=True, batch_size=WINDOW, remove_columns=["tokens", "learned"])
    if next(iter(rows), None) is None:
        raise Refusal(f"{encoder.source.name} holds nothing to learn in the first tokens of any example")
    encoder.shortened = encoder.dropped = 0  # of the look ahead
    return rows.repeat(None)
