"""The `rwkv` command: parse, call the library, print.

Text goes to standard output, everything about it to standard error. An error is one line there and exit code 2.
torch and transformers take seconds to import, so only the commands do, never this file.
"""

import errno
import importlib
import importlib.metadata
import io
import json
import math
import os
import sys
import traceback
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, NoReturn

import typer
from typer.core import TyperGroup


class CommandError(Exception):
    """What a person can put right: one sentence with the value and the cure."""


class Commands(TyperGroup):
    """The commands, and the one place where errors become a line."""

    debug = False

    def main(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.pop("standalone_mode", True):
            return super().main(*args, **kwargs | {"standalone_mode": False})
        try:
            code = super().main(*args, **kwargs | {"standalone_mode": False})
        except typer.TyperException as error:
            context = getattr(error, "ctx", None)
            name = context.command_path if context else "rwkv"
            self.fail(f"{error.format_message().rstrip('.')}; see {name} --help")
        except CommandError as error:
            self.fail(str(error))
        except OSError as error:
            self.fail(_explain(error))
        except typer.Abort:
            code = 130
        sys.exit(code or 0)

    def fail(self, sentence: str) -> NoReturn:
        if self.debug:
            traceback.print_exc()
        typer.echo("Error: " + " ".join(sentence.splitlines()), err=True)
        sys.exit(2)


def _explain(error: OSError) -> str:
    name = f"{error.filename}: " if error.filename else ""
    cures = {
        errno.ENOSPC: "free some space, or choose another disk",
        errno.EACCES: "choose a file that you may use, or change its permissions",
        errno.ENOENT: "check the path",
    }
    return (
        f"{name}{error.strerror or error}; {cures.get(error.errno or 0, 'check the path, and the disk that it is on')}"
    )


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


# -- options ---------------------------------------------------------------------------------------


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"rwkv {importlib.metadata.version('modeling-rwkv')}")
        raise typer.Exit()


def _set_debug(context: typer.Context, value: bool) -> None:
    root = context.find_root().command
    if value and isinstance(root, Commands):
        root.debug = True


def _number(option: str, kind: type[int] | type[float], fits: Callable[[float], bool], wanted: str) -> Any:
    """The parser of an option that is a number."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which fits nothing
        if not fits(value):
            raise CommandError(f"{option} is {text}: give {wanted}")
        return value

    return parse


_count = partial(_number, kind=int, fits=lambda x: x >= 1, wanted="a whole number from 1 up")
# Divided by less, logits leave the range of float32.
_temperature = _number(
    "--temperature", float, lambda x: x == 0 or 1e-3 <= x < math.inf, "0 for the likeliest text, or 0.001 and more"
)
_top_p = _number("--top-p", float, lambda x: 0 < x <= 1, "1 for no limit, or a number between 0 and 1 such as 0.9")
_seed = _number("--seed", int, lambda x: 0 <= x < 2**64, "a whole number from 0 to 2^64 - 1")


def _check_prompt(value: str) -> str:
    """The prompt; `-` is standard input, without the line break that `echo` puts at its end."""
    if value == "-":
        value = _read_stdin().removesuffix("\n").removesuffix("\r")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # Python's stand-ins for bytes of the command line that are no text
        raise CommandError(f"the prompt {value!a} is not UTF-8: write it in UTF-8") from error
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


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, is_eager=True, help="Show warnings, and tracebacks of errors.")
]


# -- commands --------------------------------------------------------------------------------------


@app.callback(invoke_without_command=True)
def rwkv(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """RWKV-4 language models: write text, train, convert checkpoints, check the installation.

    \b
    Examples:
      rwkv generate "Once upon a time"
      rwkv convert RWKV-4-Pile-169M.pth my-model/ --tokenizer tokenizer.json
      rwkv doctor
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
def generate(
    prompt: Annotated[
        str, typer.Argument(callback=_check_prompt, metavar="PROMPT", help="Text to go on from; - reads stdin.")
    ],
    model: Annotated[
        str | None,
        typer.Option(
            help="Folder of a model, or its name on the Hugging Face Hub. [default: the model in the box]",
            show_default=False,
        ),
    ] = None,
    state: Annotated[
        str | None,
        typer.Option(help="File of a state to begin with, as state tuning makes them.", show_default=False),
    ] = None,
    max_new_tokens: Annotated[
        int, typer.Option(parser=_count("--max-new-tokens"), metavar="N", help="Tokens to write at most.")
    ] = 200,
    temperature: Annotated[
        float,
        typer.Option(parser=_temperature, metavar="X", help="Higher is wilder; 0 takes the likeliest token."),
    ] = 0.8,
    top_p: Annotated[
        float,
        typer.Option(parser=_top_p, metavar="X", help="Draw from the likeliest tokens that sum up to this."),
    ] = 0.9,
    top_k: Annotated[
        int | None,
        typer.Option(
            parser=_count("--top-k"),
            metavar="N",
            help="Draw from this many tokens. [default: no limit]",
            show_default=False,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            parser=_seed,
            metavar="N",
            help="Draw the same text again. [default: another each time]",
            show_default=False,
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, ...; auto is cuda if there is one.")] = "auto",
    dtype: Annotated[
        str,
        typer.Option(
            help="float32, bfloat16, float16 or float64; auto is float32 on a CPU, "
            "and what the checkpoint is stored in on a GPU."
        ),
    ] = "auto",
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

    try:
        with generation.quiet(debug):
            place = generation.find_device(device)
            loaded, tokenizer = generation.load(model, place, generation.find_dtype(dtype, place))
            if state is not None:
                generation.begin_with(loaded, state)
            sampling = generation.Sampling(temperature, top_p, top_k, seed)
            write = _ignore if as_json else _write
            result = generation.generate(loaded, tokenizer, prompt, max_new_tokens, sampling, write)
    except generation.GenerateError as error:
        raise CommandError(str(error)) from error
    except KeyboardInterrupt:
        typer.echo(err=True)
        raise typer.Exit(130) from None
    if as_json:
        settings = {
            "model": str(loaded.name_or_path),
            "device": str(loaded.device),
            "dtype": str(loaded.dtype).removeprefix("torch."),
            "state": state,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "top_p": top_p,
            "top_k": top_k,
        }
        _write(json.dumps(result.to_dict() | settings, ensure_ascii=False, indent=2) + "\n")
        return
    _write("\n")
    again = "" if result.seed is None else f", --seed {result.seed}"
    typer.echo(
        f"{result.tokens} tokens in {result.seconds:.2f} s, {result.tokens_per_second:.1f} tokens/s{again}", err=True
    )


@app.command()
def convert(
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A .pth file, or a Hugging Face folder.")],
    destination: Annotated[str, typer.Argument(metavar="DESTINATION", help="The folder, or the .pth file, to write.")],
    tokenizer: Annotated[
        str | None,
        typer.Option(help="tokenizer.json, or a folder with one, to put beside the weights.", show_default=False),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(help="Cast to float32, bfloat16, ... [default: every tensor as it is]", show_default=False),
    ] = None,
    context_length: Annotated[
        int,
        typer.Option(
            parser=_count("--context-length"),
            metavar="N",
            help="Length of the texts in training; a .pth file does not say.",
        ),
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
      rwkv convert my-model/ my-model.pth --dtype bfloat16
    """
    from modeling_rwkv import checkpoints

    try:
        report = checkpoints.convert(
            source,
            destination,
            tokenizer=tokenizer,
            context_length=context_length,
            dtype=dtype,
            max_shard_size=max_shard_size,
            progress=sys.stderr.isatty(),
        )
    except checkpoints.CheckpointError as error:
        raise CommandError(str(error)) from error
    size, kinds = f"{report.nbytes / 1e6:,.1f} MB", ", ".join(report.dtypes)
    _write(f"{report.parameters:,} parameters in {report.tensors} tensors, {size} of {kinds}\n")
    _write(", ".join(f"{name} {value}" for name, value in report.sizes.items()) + "\n")
    for file in (*report.files, *filter(None, [report.tokenizer])):
        _write(f"wrote {file}\n")
    if report.destination.is_dir() and report.tokenizer is None:
        typer.echo("No tokenizer is beside the weights, and to generate needs one: see --tokenizer.", err=True)


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or Hub id of a PEFT adapter.")],
    destination: Annotated[str, typer.Argument(metavar="DESTINATION", help="The folder to write.")],
    base: Annotated[
        str | None,
        typer.Option(help="The adapter's base model. [default: what the adapter says]", show_default=False),
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
    library = _training("rwkv_finetune.merge")
    try:
        parameters = library.merge(adapter, destination, base, dtype)
    except _training("rwkv_finetune.arguments").Refusal as error:
        raise CommandError(str(error)) from error
    _write(f"wrote {destination}: {parameters:,} parameters of {dtype}\n")


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
    _training(f"rwkv_finetune.{name}").main(context.args, prog=context.command_path)


def _training(module: str) -> Any:
    """A module of the training room, whose packages are an extra."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CommandError(
            f"training needs {error.name}, which is not installed: pip install modeling-rwkv[finetune]"
        ) from error


@app.command()
def doctor(as_json: Json = False, debug: Debug = False) -> None:
    """Show what is installed, and test it.

    Versions, devices, and which implementation of the WKV operator each device runs; then a test of a second.
    Exit code 1 says that a test failed.
    """
    from modeling_rwkv import doctor as library

    found = library.examine()
    if not as_json:
        _write(_describe(found))
    tests = []
    for test in library.self_test():
        tests.append(test)
        if not as_json:
            _write(f"  {'PASS' if test['passed'] else 'FAIL'}  {test['name']} ({test['detail']})\n")
    passed = all(test["passed"] for test in tests)
    if as_json:
        _write(json.dumps(found | {"self_test": tests, "passed": passed}, indent=2) + "\n")
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
    return "\n".join([*lines, "", "self-test", ""])


# -- printing --------------------------------------------------------------------------------------


def _write(text: str) -> None:
    """To standard output at once."""
    try:
        sys.stdout.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # typer ends the program without a word
        raise
    except OSError as error:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - or Python would try and fail again at its end
        raise CommandError(
            f"the output cannot be written ({error.strerror}): free some space or write elsewhere"
        ) from error


def _ignore(text: str) -> None:
    pass


if __name__ == "__main__":
    main()
