"""The options of the commands that write text. Like them, they must not import torch."""

import math
from typing import Annotated

import typer

from modeling_rwkv.cli_base import count, number

State = Annotated[str | None, typer.Option(help="File of a state to begin with, as state tuning makes them.")]
MaxNewTokens = Annotated[int, count("--max-new-tokens", "Tokens to write at most.")]
Temperature = Annotated[
    float,
    number(
        "--temperature",
        "Higher is wilder; 0 takes the likeliest token.",
        # Divided by less, logits leave the range of float32.
        lambda x: x == 0 or 1e-3 <= x < math.inf,
        "0 for the likeliest text, or 0.001 and more",
    ),
]
TopP = Annotated[
    float,
    number(
        "--top-p",
        "Draw from the likeliest tokens that sum up to this.",
        lambda x: 0 < x <= 1,
        "1 for no limit, or a number between 0 and 1 such as 0.9",
    ),
]
TopK = Annotated[int | None, count("--top-k", "Draw from this many tokens. [default: no limit]")]
Seed = Annotated[
    int | None,
    number(
        "--seed",
        "Draw the same text again. [default: another each time]",
        lambda x: 0 <= x < 2**64,
        "a whole number from 0 to 2^64 - 1",
        int,
    ),
]
Device = Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is cuda if there is one.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="float32, bfloat16, float16 or float64; auto is float32 on a CPU, "
        "and what the checkpoint is stored in on a GPU. A quantized model keeps its own."
    ),
]
