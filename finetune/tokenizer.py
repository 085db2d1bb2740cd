"""Train a byte-level BPE tokenizer on a text file and save it in Hugging Face's format.

    python -m rwkv_finetune.tokenizer --train_file train.txt --output_dir tokenizer/
    python -m rwkv_finetune.tokenizer --train_file train.txt --output_dir tokenizer/ \
        --vocab_size 8192

Special tokens follow the tokenizer of the RWKV-4 Pile models: `<|endoftext|>` (id 0) is
beginning, end and unknown; `<|padding|>` (id 1) pads. Every byte is a token and nothing is
normalised, so `decode(encode(text)) == text` for every text. No space and no `<|endoftext|>` is
added by itself.
"""

import os
import shutil
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from rwkv_eval.documents import read_documents
from rwkv_finetune.arguments import ProgramParser
from rwkv_finetune.run_folder import unfinished

END_OF_TEXT = "<|endoftext|>"
PADDING = "<|padding|>"
SMALLEST_VOCABULARY = 256 + 2  # every byte, and the two special tokens


@dataclass
class TokenizerArguments:
    train_file: str = field(metadata={"help": "UTF-8 text, documents separated by <|endoftext|>"})
    output_dir: str = field(metadata={"help": "folder to create"})
    vocab_size: int = field(default=4096, metadata={"help": "tokens, special ones included"})


def train_tokenizer(documents: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Learn at most `vocab_size` tokens from `documents` (the same ones every time).

    Raises:
        ValueError: `vocab_size` does not even hold every byte.
    """
    if vocab_size < SMALLEST_VOCABULARY:
        raise ValueError(f"vocab_size {vocab_size} is too small; use {SMALLEST_VOCABULARY} or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT, PADDING],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=sys.stderr.isatty(),
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        unk_token=END_OF_TEXT,
        pad_token=PADDING,
        clean_up_tokenization_spaces=False,
        padding_side="left",  # what `generate` needs for a batch of prompts
    )


def save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: str | Path) -> None:
    """Save so that `folder` either does not exist or is complete, whenever this is killed.

    Raises:
        FileExistsError: `folder` exists.
    """
    folder = Path(folder)
    if folder.exists():
        raise FileExistsError(f"{folder} exists already; choose another folder or remove it")
    shutil.rmtree(unfinished(folder), ignore_errors=True)
    tokenizer.save_pretrained(unfinished(folder))
    os.replace(unfinished(folder), folder)


def main(argv: list[str] | None = None) -> None:
    parser = ProgramParser(
        [TokenizerArguments], prog="python -m rwkv_finetune.tokenizer", description=__doc__.partition("\n")[0]
    )
    (args,) = parser.parse(argv)
    try:
        if Path(args.output_dir).exists():
            raise FileExistsError(f"{args.output_dir} exists already; choose another folder")
        tokenizer = train_tokenizer(read_documents(args.train_file), args.vocab_size)
        save_tokenizer(tokenizer, args.output_dir)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    print(f"{len(tokenizer)} tokens saved in {args.output_dir}")


if __name__ == "__main__":
    main()
