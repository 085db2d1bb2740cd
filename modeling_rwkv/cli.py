"""The `rwkv` command: parse, call the library, print. Other commands are in cli_chat.py, cli_training.py, cli_eval.py.

Text goes to standard output, everything about it to standard error. An error is one line there and exit code 2.
torch and transformers take seconds to import, so only the commands do, never these files.
"""

import importlib.metadata
import io
import json
import sys
from dataclasses import asdict
from typing import Annotated, Any

import typer

from modeling_rwkv import cli_chat, cli_eval, cli_training
from modeling_rwkv.cli_base import CommandError, Commands, Debug, Json, count, shows_progress, write
from modeling_rwkv.cli_options import Device, Dtype, MaxNewTokens, Seed, State, Temperature, TopK, TopP

app = typer.Typer(
    cls=Commands,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """The `rwkv` program."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a letter is no reason to stop
    app(prog_name="rwkv")


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"rwkv {importlib.metadata.version('modeling-rwkv')}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def rwkv(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """RWKV-4 language models: write text, train, evaluate, convert and share checkpoints, check the installation.

    \b
    Examples:
      rwkv generate "Once upon a time"
      rwkv chat my-model/
      rwkv convert RWKV-4-Pile-169M.pth my-model/ --tokenizer tokenizer.json
      rwkv doctor
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


app.add_typer(cli_chat.app)
app.add_typer(cli_training.app)
app.add_typer(cli_eval.app)


# -- generate --------------------------------------------------------------------------------------


def _check_prompt(value: str) -> str:
    """The prompt; `-` is standard input, without the line break that `echo` puts at its end."""
    if value == "-":
        value = _read_stdin().removesuffix("\n").removesuffix("\r")
    if not value.strip():
        raise CommandError(f"the prompt {value[:20]!r} is empty: give some words to go on from")
    return value


def _read_stdin() -> str:
    if sys.stdin is None:
        raise CommandError("the prompt is -, but standard input is closed: pipe some text into it")
    try:
        return sys.stdin.buffer.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise CommandError(
            f"standard input is not UTF-8 (byte {error.object[error.start]:#04x} at {error.start}): "
            "convert it first, for example with iconv -t UTF-8"
        ) from error


Prompt = Annotated[
    str, typer.Argument(callback=_check_prompt, metavar="PROMPT", help="Text to go on from; - reads stdin.")
]
Model = Annotated[
    str | None,
    typer.Option(help="Folder of a model, or its name on the Hugging Face Hub. [default: the model in the box]"),
]


@app.command()
def generate(
    prompt: Prompt,
    model: Model = None,
    state: State = None,
    max_new_tokens: MaxNewTokens = 200,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.9,
    top_k: TopK = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    as_json: Json = False,
    debug: Debug = False,
) -> None:
    """Write on from a prompt.

    Prints the prompt and then the text as it is written. Only these go to standard output; how fast it was, and
    the seed to write it again, go to standard error.

    \b
    Examples:
      rwkv generate "Once upon a time"
      rwkv generate "The cat" --temperature 0 --max-new-tokens 50
      rwkv generate - --model my-model/ < beginning.txt
      rwkv generate "Name a color." --state run/state/state.safetensors
      rwkv generate -- "- a text that begins with a dash"
    """
    from modeling_rwkv import generation

    sampling = generation.Sampling(temperature, top_p, top_k, seed)
    try:
        with generation.quiet(debug):
            loaded, tokenizer = generation.load_as_asked(model, state, device, dtype)
            show = (lambda text: None) if as_json else write
            result = generation.generate(loaded, tokenizer, prompt, max_new_tokens, sampling, show, shows_progress())
    except generation.GenerateError as error:
        raise CommandError(str(error)) from error
    except KeyboardInterrupt:
        typer.echo(err=True)
        raise typer.Exit(130) from None
    if as_json:
        dtype = str(loaded.dtype).removeprefix("torch.")
        found = {"model": str(loaded.name_or_path), "device": str(loaded.device), "dtype": dtype, "state": state}
        settings = asdict(sampling) | {"max_new_tokens": max_new_tokens}
        write(json.dumps(found | settings | result.to_dict(), ensure_ascii=False, indent=2) + "\n")
    else:
        again = "" if result.seed is None else f", --seed {result.seed}"
        write("\n")
        typer.echo(result.summary() + again, err=True)


# -- convert, share and doctor ---------------------------------------------------------------------


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A .pth file, or a Hugging Face folder.")],
    destination: Annotated[str, typer.Argument(metavar="DESTINATION", help="The folder, or the .pth file, to write.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="tokenizer.json, or a folder with one, to put beside the weights."),
    ] = None,
    vocab: Annotated[
        str | None,
        typer.Option(help="Or the vocabulary file of a World model; world is that of the installed rwkv package."),
    ] = None,
    chat: Annotated[
        str | None,
        typer.Option(
            help="Chat template, where generation then stops, too: world, raven, instruct or none. "
            "[default: world with --vocab]"
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Cast to float32, bfloat16, ... [default: every tensor as it is]"),
    ] = None,
    context_length: Annotated[
        int, count("--context-length", "Length of the texts in training; a .pth file does not say.")
    ] = 1024,
    max_shard_size: Annotated[str, typer.Option(help="Size of a file of weights in a folder.")] = "5GB",
    debug: Debug = False,
) -> None:
    """Convert a checkpoint, .pth file to folder or back.

    An RWKV-4 .pth file becomes a Hugging Face folder, or the reverse, bit for bit; what SOURCE is decides.
    Nothing is overwritten, and what was written is read again and compared before it gets its name.

    \b
    Examples:
      rwkv convert RWKV-4-Pile-169M.pth my-model/ --tokenizer tokenizer.json
      rwkv convert RWKV-4-World-0.4B.pth my-model/ --vocab world
      rwkv convert Raven-1B5.pth my-model/ --tokenizer tokenizer.json --chat raven
      rwkv convert my-model/ my-model.pth --dtype bfloat16
    """
    from modeling_rwkv import checkpoints

    try:
        report = checkpoints.convert(
            source,
            destination,
            tokenizer=tokenizer,
            vocab=vocab,
            chat=chat,
            context_length=context_length,
            dtype=dtype,
            max_shard_size=max_shard_size,
            progress=shows_progress(),
        )
    except checkpoints.CheckpointError as error:
        raise CommandError(str(error)) from error
    size, kinds = f"{report.nbytes / 1e6:,.1f} MB", ", ".join(report.dtypes)
    write(f"{report.parameters:,} parameters in {report.tensors} tensors, {size} of {kinds}\n")
    write(", ".join(f"{name} {value}" for name, value in report.sizes.items()) + "\n")
    for file in (*report.files, *filter(None, [report.tokenizer])):
        write(f"wrote {file}\n")
    if report.destination.is_dir() and report.tokenizer is None:
        typer.echo(
            "No tokenizer is beside the weights, and to generate needs one: see --tokenizer and --vocab.", err=True
        )


@app.command()
def share(
    folder: Annotated[str, typer.Argument(metavar="FOLDER", help="A model's folder.")],
    debug: Debug = False,
) -> None:
    """Prepare a model's folder for everybody.

    Puts there what programs need that do not know this package: with trust_remote_code=True they use it, or say how
    to install it. And a README.md that describes the model; one that is there only gets what its head lacks.

    \b
    Examples:
      rwkv share my-model/
      hf upload my-name/my-model my-model/
    """
    from modeling_rwkv import sharing

    try:
        written = sharing.share(folder)
    except ValueError as error:
        raise CommandError(str(error)) from error
    for file in written:
        write(f"wrote {file}\n")


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Show what is installed, and test it.

    Versions, devices, and which implementation of the WKV operator each device runs; then a test of a second.
    Exit code 1 says that a test failed.
    """
    from modeling_rwkv import doctor as library

    found = library.examine()
    if not as_json:
        write(_describe(found))
    tests = []
    for test in library.self_test():
        tests.append(test)
        if not as_json:
            write(f"  {'PASS' if test['passed'] else 'FAIL'}  {test['name']} ({test['detail']})\n")
    passed = all(test["passed"] for test in tests)
    if as_json:
        write(json.dumps(found | {"self_test": tests, "passed": passed}, indent=2) + "\n")
    raise typer.Exit(0 if passed else 1)


def _describe(found: dict[str, Any]) -> str:
    lines = [f"{name:<14} {version or 'not installed'}" for name, version in found["versions"].items()]
    lines += [f"{'platform':<14} {found['platform']}", f"{'model in box':<14} {found['demo_model'] or 'missing'}"]
    for device in found["devices"]:
        memory = f"{device['memory_bytes'] / 2**30:.1f} GiB, " if "memory_bytes" in device else ""
        threads = f", {device['threads']} threads on {device['cores']} cores" if "threads" in device else ""
        lines += ["", f"{device['device']}: {device['name']}, {memory}capability {device['capability']}{threads}"]
        for backend in dict.fromkeys(device["wkv"].values()):
            dtypes = [dtype for dtype, chosen in device["wkv"].items() if chosen == backend]
            lines.append(f"  WKV runs as {backend} in {', '.join(dtypes)}")
        lines += [f"  not as {backend}: {reason}" for backend, reason in device["not_wkv"].items()]
        if "not_decoding" in device:
            reason = device["not_decoding"]
            lines.append(f"  the next token is computed {f'module by module: {reason}' if reason else 'at once'}")
    return "\n".join([*lines, "", "self-test", ""])


if __name__ == "__main__":
    main()
