"""Arguments of the training programs: dataclasses, a YAML file, and a command line that wins.

    parser = ProgramParser((ModelArguments, TrainingArguments), description=__doc__)
    parser.run(argv, program)  # program(model_args, training_args, prog, typed)

`--config FILE` names a YAML mapping from field names to values. Every key must be a field of one
of the dataclasses; the command line is read after the file and therefore wins. Whatever is wrong
is one sentence on stderr and exit status 2.
"""

import difflib
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import MISSING, asdict, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser, TrainingArguments


class Refusal(Exception):
    """Bad input: its message is one sentence that says what is wrong and what to do."""


class ProgramParser(HfArgumentParser):
    """`HfArgumentParser` with `--config`, errors of one line, and no abbreviated options."""

    def __init__(self, dataclass_types: Iterable[type], **kwargs: Any):
        super().__init__(dataclass_types, allow_abbrev=False, **kwargs)
        self.add_argument("--config", metavar="FILE", help="YAML file of any of these options")

    def parse(self, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
        """One object per dataclass, in order, from `argv` (default: this program's)."""
        words = list(sys.argv[1:] if argv is None else argv)
        try:
            words = self._config_words(words) + words
            *parsed, _, unknown = self.parse_args_into_dataclasses(
                words, return_remaining_strings=True, look_for_args_file=False
            )
        except (Refusal, ValueError, TypeError) as error:
            self.error(str(error))
        if unknown:
            self.error(self._unknown(unknown[0].split("=")[0].lstrip("-"), "the command line"))
        return tuple(parsed)

    def run(self, argv: Sequence[str] | None, program: Callable[..., None]) -> None:
        """`program(*objects, prog, options as they were typed)`, and in one sentence what is wrong."""
        words = list(sys.argv[1:] if argv is None else argv)
        try:
            program(*self.parse(words), self.prog, shlex.join(words))
        except (Refusal, FloatingPointError, OSError) as error:
            self.error(str(error))

    def error(self, message: str) -> NoReturn:
        """One sentence instead of a screen of usage: there are more than a hundred options."""
        print("error:", " ".join(message.split()), file=sys.stderr)
        raise SystemExit(2)

    def _config_words(self, argv: list[str]) -> list[str]:
        """The config file as command-line words, so that both are read by the same rules."""
        paths = [w.partition("=")[2] for w in argv if w.startswith("--config=")]
        paths += [value for word, value in pairwise(argv) if word == "--config"]
        words: list[str] = []
        for path in paths:
            for key, value in read_yaml(path).items():
                if key not in self._fields():
                    raise Refusal(self._unknown(key, path))
                words += _as_words(key, value)
        return words

    def _fields(self) -> set[str]:
        return {action.dest for action in self._actions} - {"help", "config"}

    def _unknown(self, key: str, where: str) -> str:
        close = difflib.get_close_matches(key, self._fields(), n=1)
        hint = f"did you mean {close[0]!r}?" if close else "--help lists all of them."
        return f"unknown key {key!r} in {where}; {hint}"


def read_yaml(path: str | Path) -> dict[str, Any]:
    """A YAML file that must hold one mapping (or nothing)."""
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal(f"cannot read the config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refusal(f"the config {path} is not valid YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise Refusal(f"the config {path} must be a mapping of option names to values")
    return {str(key): value for key, value in content.items()}


def _as_words(key: str, value: Any) -> list[str]:
    if value is None:
        return []
    if isinstance(value, list):
        return [f"--{key}", *map(str, value)]
    return [f"--{key}={json.dumps(value) if isinstance(value, dict | bool) else value}"]


def settings_of(*arguments: Any) -> dict[str, Any]:
    """The options of these dataclass instances that differ from their defaults, in JSON's types."""
    settings: dict[str, Any] = {}
    for group in arguments:
        if isinstance(group, TrainingArguments):  # its values change when it is created
            shared = {"use_configured_state": True}  # else it would reset what a trainer at work relies on
            values, defaults = group.to_dict(), type(group)(output_dir=".", accelerator_config=shared).to_dict()
        else:
            values, defaults = asdict(group), _defaults(group)
        settings |= {k: v for k, v in values.items() if v != defaults.get(k, MISSING)}
    return settings


def _defaults(group: Any) -> dict[str, Any]:
    factories = {f.name: f.default_factory for f in fields(group)}
    made = {name: make() for name, make in factories.items() if make is not MISSING}
    return {f.name: f.default for f in fields(group)} | made
