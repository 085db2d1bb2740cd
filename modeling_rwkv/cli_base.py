"""What the commands share: how an error becomes one line, options, printing. Like them, it must not import torch."""

import errno
import importlib
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
            self.fail(explain(error))
        except typer.Abort:
            code = 130
        sys.exit(code or 0)

    def fail(self, sentence: str) -> NoReturn:
        if self.debug:
            traceback.print_exc()
        typer.echo("Error: " + " ".join(sentence.splitlines()), err=True)
        sys.exit(2)


def explain(error: OSError) -> str:
    """It in a sentence, with a cure."""
    name = f"{error.filename}: " if error.filename else ""
    cures = {
        errno.ENOSPC: "free some space, or choose another disk",
        errno.EACCES: "choose a file that you may use, or change its permissions",
        errno.ENOENT: "check the path",
    }
    return (
        f"{name}{error.strerror or error}; {cures.get(error.errno or 0, 'check the path, and the disk that it is on')}"
    )


def _set_debug(context: typer.Context, value: bool) -> None:
    root = context.find_root().command
    if value and isinstance(root, Commands):
        root.debug = True


Json = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
Debug = Annotated[
    bool, typer.Option("--debug", callback=_set_debug, is_eager=True, help="Show warnings, and tracebacks of errors.")
]


def number(
    option: str, help: str, fits: Callable[[float], bool], wanted: str, kind: type[int] | type[float] = float
) -> Any:
    """An option that is a number, and is refused where it does not fit."""

    def parse(text: str) -> int | float:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan  # which fits nothing
        if not fits(value):
            raise CommandError(f"{option} is {text}: give {wanted}")
        return value

    return typer.Option(option, parser=parse, metavar="N" if kind is int else "X", help=help)


count = partial(number, kind=int, fits=lambda x: x >= 1, wanted="a whole number from 1 up")


def write(text: str) -> None:
    """To standard output at once."""
    if sys.stdout is None:
        raise CommandError("standard output is closed: leave it open, or write to a file")
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


def shows_progress() -> bool:
    """Whether somebody watches standard error."""
    return sys.stderr is not None and sys.stderr.isatty()


def optional(module: str, extra: str) -> Any:
    """A module whose packages only come with ``pip install modeling-rwkv[extra]``."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise CommandError(
            f"this needs {error.name}, which is not installed: pip install modeling-rwkv[{extra}]"
        ) from error
