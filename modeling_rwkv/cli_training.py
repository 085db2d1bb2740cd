"""The commands that train: they run the programs of `finetune/`, whose packages are an extra."""

from typing import Annotated, Any

import typer

from modeling_rwkv.cli_base import CommandError, Debug, optional, write

app = typer.Typer()


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub id of a PEFT adapter.")],
    destination: Annotated[str, typer.Argument(metavar="DESTINATION", help="The folder to write.")],
    base: Annotated[
        str | None,
        typer.Option(help="The adapter's base model. [default: what the adapter says]"),
    ] = None,
    dtype: Annotated[
        str, typer.Option(help="float32, bfloat16 or float16; fewer bits round what was learned.")
    ] = "float32",
    debug: Debug = False,
) -> None:
    """Merge an adapter into its model, and write that.

    \b
    Examples:
      rwkv merge run/adapter merged/
      rwkv merge run/adapter merged/ --dtype bfloat16
    """
    library = _module("merge")
    try:
        parameters = library.merge(adapter, destination, base, dtype)
    except _module("arguments").Refusal as error:
        raise CommandError(str(error)) from error
    write(f"wrote {destination}: {parameters:,} parameters of {dtype}\n")


# The training programs have parsers of their own, with the options of transformers.TrainingArguments.
PROGRAM: Any = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}

programs = typer.Typer(rich_markup_mode=None)
app.add_typer(programs, name="finetune")


@programs.callback(invoke_without_command=True)
def finetune(context: typer.Context) -> None:
    """Train a model further, on instructions, chats or texts.

    \b
    Examples:
      rwkv finetune lora --model my-model/ --train_file my.jsonl --output_dir run/
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@programs.command(**PROGRAM)
def lora(context: typer.Context) -> None:
    """Train small matrices beside the frozen ones."""
    _run_program("lora", context)


@programs.command(**PROGRAM)
def full(context: typer.Context) -> None:
    """Train every parameter."""
    _run_program("full", context)


@programs.command(**PROGRAM)
def state(context: typer.Context) -> None:
    """Train the state that a model begins with."""
    _run_program("state", context)


@programs.command(**PROGRAM)
def extend_context(context: typer.Context) -> None:
    """Train a model on longer and longer texts."""
    _run_program("extend_context", context)


@app.command(**PROGRAM)
def pretrain(context: typer.Context) -> None:
    """Train a model from scratch on a text file."""
    _run_program("pretrain", context)


def _run_program(name: str, context: typer.Context) -> None:
    _module(name).main(context.args, prog=context.command_path)


def _module(name: str) -> Any:
    return optional(f"rwkv_finetune.{name}", "finetune")
