"""The command that talks: a line is a message, or begins with a slash and is one of COMMANDS."""

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Annotated, Any

import typer

from modeling_rwkv.cli_base import CommandError, Debug, explain, shows_progress, write
from modeling_rwkv.cli_options import Device, Dtype, MaxNewTokens, Seed, State, Temperature, TopK, TopP

app = typer.Typer()


@app.command()
def chat(
    model: Annotated[
        str | None,
        typer.Argument(metavar="MODEL", help="Folder or Hub id of an RWKV-4. [default: the model in the box]"),
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message.")] = None,
    template: Annotated[
        str | None,
        typer.Option(help="world, raven or instruct: how messages are written. [default: the tokenizer's, or world]"),
    ] = None,
    state: State = None,
    max_new_tokens: MaxNewTokens = 500,
    temperature: Temperature = 0.8,
    top_p: TopP = 0.9,
    top_k: TopK = None,
    seed: Seed = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    debug: Debug = False,
) -> None:
    """Talk with a model.

    Every line is a message, or a command: /help lists them. Ctrl-C ends an answer, Ctrl-D the talk. Where standard
    input is no terminal, answers alone go to standard output, and the first error ends it.

    \b
    Examples:
      rwkv chat my-world-model/
      rwkv chat my-world-model/ --system "You answer in one word." --temperature 0
      rwkv chat RWKV/rwkv-raven-1b5 --template raven
      echo "Name a color." | rwkv chat my-world-model/
    """
    from modeling_rwkv import generation
    from modeling_rwkv.chat import Conversation

    sampling = generation.Sampling(temperature, top_p, top_k, seed)
    try:
        with generation.quiet(debug):
            loaded, tokenizer = generation.load_as_asked(model, state, device, dtype)
            conversation = Conversation(loaded, tokenizer, system, template, shows_progress())
            talk = Talk(conversation, sampling.arguments(), max_new_tokens=max_new_tokens)
            if model is None:
                _say("The model in the box writes stories and has learned no chat: give a model that has.")
            sampling.plant()
            with generation.few_threads(loaded):
                talk.run(is_terminal=sys.stdin is not None and sys.stdin.isatty())
    except ValueError as error:
        raise CommandError(str(error)) from error
    except KeyboardInterrupt:
        typer.echo(err=True)
        raise typer.Exit(130) from None


class Talk:
    """A conversation by lines, and what `generate` is given for every answer."""

    def __init__(self, conversation: Any, sampling: dict[str, Any], max_new_tokens: int) -> None:
        self.conversation, self.options = conversation, sampling | {"max_new_tokens": max_new_tokens}

    def run(self, is_terminal: bool) -> None:
        """Until the lines end; at a terminal, errors and Ctrl-C do not end it."""
        for line in _typed() if is_terminal else _piped():
            try:
                if not self.take(line):
                    break
            except BrokenPipeError:
                raise
            except (ValueError, OSError) as error:
                sentence = explain(error) if isinstance(error, OSError) else str(error)
                if not is_terminal:
                    raise CommandError(sentence) from error
                _say(f"Error: {' '.join(sentence.splitlines())}")
            except KeyboardInterrupt:
                if not is_terminal:
                    raise
                write("\n")

    def take(self, line: str) -> bool:
        """Do what a line asks for; whether the talk goes on."""
        if not line.startswith("/") or line.startswith("//"):
            if line.strip():
                self._answer(self.conversation.say, line.removeprefix("/"))
            return True
        name, _, argument = line.strip().partition(" ")
        if name not in COMMANDS:
            raise ValueError(f"there is no command {name}: see /help, or begin a message with // for a slash")
        usage, _, action = COMMANDS[name]
        if bool(argument.strip()) != ("FILE" in usage):
            raise ValueError(f"the command is {line!r}: write {usage}")
        action(self, argument.strip())
        return name != "/quit"

    def _answer(self, method: Callable[..., str], *message: str) -> None:
        from modeling_rwkv import generation

        model = self.conversation.model
        with generation.explained(model.device, getattr(model, "is_quantized", False)):
            method(*message, write=write, **self.options)
        write("\n")

    def retry(self, _: str) -> None:
        self._answer(self.conversation.retry)

    def undo(self, _: str) -> None:
        _say(f"Taken back: {self.conversation.undo()}")

    def save(self, path: str) -> None:
        self.conversation.save(path)
        _say(f"wrote {path}")

    def load(self, path: str) -> None:
        try:
            self.conversation.load(path)
        except FileNotFoundError as error:
            raise ValueError(f"there is no file {path}: give one that /save wrote") from error
        _say(f"read {path}: {len(self.conversation.messages)} messages")

    def reset(self, _: str) -> None:
        self.conversation.reset()
        _say("All but the system message is forgotten.")

    def help(self, _: str) -> None:
        _say("\n".join(f"{usage:12} {meaning}" for usage, meaning, _ in COMMANDS.values()))

    def quit(self, _: str) -> None:
        """It is `take` that ends the talk."""


COMMANDS: dict[str, tuple[str, str, Callable[[Talk, str], None]]] = {
    "/retry": ("/retry", "draw another answer to the last message", Talk.retry),
    "/undo": ("/undo", "take back the last message and its answer", Talk.undo),
    "/save": ("/save FILE", "write the state and the messages to a file", Talk.save),
    "/load": ("/load FILE", "go on where a saved talk was; what was said here is left", Talk.load),
    "/reset": ("/reset", "forget all but the system message", Talk.reset),
    "/help": ("/help", "show this", Talk.help),
    "/quit": ("/quit", "end, as Ctrl-D does", Talk.quit),
}


def _say(text: str) -> None:
    typer.echo(text, err=True)


def _typed() -> Iterator[str]:
    """Lines from a terminal, which readline, where Python has it, lets people edit and find again."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - it is enough to import it
    write("")  # which says so where there is no output; `input` would raise a RuntimeError
    while True:
        try:
            yield input("> ")
        except EOFError:
            write("\n")
            return
        except UnicodeDecodeError:
            _say("Error: that line is not UTF-8: let the terminal write UTF-8")
        except KeyboardInterrupt:  # at the prompt: away with what was typed
            write("\n")


def _piped() -> Iterator[str]:
    """Lines of standard input."""
    if sys.stdin is None:
        raise CommandError("standard input is closed: pipe some lines into it, or run this in a terminal")
    for number, line in enumerate(sys.stdin.buffer, 1):
        try:
            yield line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
        except UnicodeDecodeError as error:
            raise CommandError(
                f"line {number} of standard input is not UTF-8: convert it first, for example with iconv -t UTF-8"
            ) from error
