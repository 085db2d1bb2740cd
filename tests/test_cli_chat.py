"""`rwkv chat`: lines of messages and commands, in a pipe and at a terminal."""

import json
import os
import select
import signal
import sys

import models
import pytest
import torch
from commands import VOCAB_SIZE, copied_model, program, random_model, rwkv  # noqa: F401 - fixtures
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_rwkv import cli_chat, generation
from modeling_rwkv.cache import saved_notes
from modeling_rwkv.chat import Conversation
from modeling_rwkv.cli_base import CommandError

NEW = 9


def talk(folder, *lines, options=(), code=0):
    """What a talk of these lines prints: standard output, and lines of standard error."""
    given = ["--max-new-tokens", NEW, *options]
    stdin = "".join(f"{line}\n" for line in lines).encode()
    result = rwkv("chat", folder, *given, stdin=stdin)
    assert result.exit_code == code, result.stderr
    return result.stdout, result.stderr.splitlines()


class Expected:
    """The same by the library; ``out`` is what is to be printed."""

    def __init__(self, folder, seed=1, system=None, sampling=None):
        model = AutoModelForCausalLM.from_pretrained(folder)
        self.conversation = Conversation(model, AutoTokenizer.from_pretrained(folder), system)
        drawn = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
        self.options, self.out = (sampling or drawn) | {"max_new_tokens": NEW}, ""
        torch.manual_seed(seed)

    def say(self, message):
        self.out += self.conversation.say(message, **self.options) + "\n"

    def retry(self):
        self.out += self.conversation.retry(**self.options) + "\n"


SEED = ("--seed", 1)


def messages(path):
    return json.loads(saved_notes(path)["conversation"])["messages"]


def test_every_line_is_a_turn(folder, tmp_path):
    expected = Expected(folder)
    for message in ("the fox", "  狐狸 🙂", "/slash"):
        expected.say(message)
    save = f"/save {tmp_path / 'talk'}"
    out, _ = talk(folder, "the fox", "", "  狐狸 🙂", "  ", "//slash", save, options=SEED)
    assert out == expected.out and messages(tmp_path / "talk") == expected.conversation.messages


def test_a_line_may_end_as_any_system_ends_it(folder, tmp_path):
    expected = Expected(folder)
    expected.say("the fox")
    expected.say("the hen")
    stdin = f"\ufeffthe fox\r\nthe hen\n/save {tmp_path / 'talk'}".encode()
    result = rwkv("chat", folder, "--max-new-tokens", NEW, *SEED, stdin=stdin)
    assert result.stdout == expected.out and messages(tmp_path / "talk") == expected.conversation.messages


def test_commands_go_back(folder, tmp_path):
    expected = Expected(folder)
    expected.say("one")
    expected.say("two")
    expected.retry()
    expected.conversation.undo()
    expected.retry()
    path = tmp_path / "talk"
    lines = ["one", "two", "/retry", "/undo", "/retry "]
    out, err = talk(folder, *lines, f"/save {path}", options=SEED)
    assert out == expected.out and messages(path) == expected.conversation.messages
    assert err == ["Taken back: two", f"wrote {path}"]
    expected.conversation.reset()
    expected.say("three")
    out, err = talk(folder, *lines, "/reset", "three", f"/save {path}", options=SEED)
    assert out == expected.out and messages(path) == expected.conversation.messages
    assert err[1] == "All but the system message is forgotten."


def test_options_are_those_of_generate(folder, tmp_path):
    expected = Expected(folder, system="rules", sampling={"do_sample": False})
    expected.say("one")
    expected.say("two")
    greedy, path = ("--temperature", 0, "--system", "rules"), tmp_path / "talk"
    assert talk(folder, "one", "two", f"/save {path}", options=greedy)[0] == expected.out
    assert messages(path) == expected.conversation.messages
    drawn = {"do_sample": True, "temperature": 1.5, "top_p": 0.5, "top_k": 7}
    expected = Expected(folder, seed=3, sampling=drawn)
    expected.say("one")
    options = ("--temperature", 1.5, "--top-p", 0.5, "--top-k", 7, "--seed", 3, "--dtype", "float32")
    assert talk(folder, "one", options=options)[0] == expected.out
    assert talk(folder, "one")[0] != talk(folder, "one")[0]


def test_a_template_may_be_chosen(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    answer = Conversation(model, tokenizer, template="raven").say("one", max_new_tokens=NEW, do_sample=False)
    assert talk(folder, "one", options=("--temperature", 0, "--template", "raven"))[0] == answer + "\n"


def test_a_talk_begins_with_a_state(folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        model(models.text(1, 7)).past_key_values.save(tmp_path / "state")
    expected = Expected(folder, sampling={"do_sample": False})
    expected.conversation.model.set_initial_state(tmp_path / "state")
    expected.say("one")
    greedy = ("--temperature", 0)
    assert talk(folder, "one", options=(*greedy, "--state", tmp_path / "state"))[0] == expected.out
    assert talk(folder, "one", options=greedy)[0] != expected.out
    line = talk(folder, options=("--state", tmp_path / "nothing"), code=2)[1][0]
    assert line.startswith("Error: ") and str(tmp_path / "nothing") in line


def test_a_saved_talk_goes_on(folder, tmp_path):
    path, greedy = tmp_path / "a talk", ("--temperature", 0)
    whole, _ = talk(folder, "one", "two", "three", options=greedy)
    first, err = talk(folder, "one", "two", f"/save {path}", "/quit", "never said", options=greedy)
    assert err == [f"wrote {path}"] and list(tmp_path.iterdir()) == [path]
    second, err = talk(folder, "zero", f"/load {path}", "three", options=greedy)
    assert err == [f"read {path}: 4 messages"]
    assert first + second.removeprefix(talk(folder, "zero", options=greedy)[0]) == whole
    talk(folder, options=("--state", path))


def test_help_names_every_command(folder):
    out, err = talk(folder, "/help")
    assert out == ""
    assert {line.split()[0] for line in err} == cli_chat.COMMANDS.keys()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("/what", ["/what", "/help", "//"]),
        ("/undo it", ["/undo it", "write /undo"]),
        ("/save", ["/save FILE"]),
        ("/load ", ["/load FILE"]),
        ("/undo", ["undo"]),
        ("/retry", ["again"]),
        ("/save {folder}/talk", ["nothing has been said"]),
        ("/load {folder}/talk", ["{folder}/talk", "/save"]),
        ("/load {folder}/model.safetensors", ["{folder}/model.safetensors", "not a saved"]),
    ],
    ids=lambda x: x if isinstance(x, str) else "",
)
def test_a_command_that_cannot_be_done_ends_a_pipe_with_a_line(folder, line, words):
    out, err = talk(folder, line.format(folder=folder), "one", code=2)
    assert out == "" and len(err) == 1 and err[0].startswith("Error: ")
    for word in words:
        assert word.format(folder=folder) in err[0]


def test_what_was_answered_before_an_error_is_printed(folder, tmp_path):
    expected = Expected(folder)
    expected.say("one")
    out, err = talk(folder, "one", f"/save {tmp_path}/no/where", "two", options=SEED, code=2)
    assert out == expected.out
    assert len(err) == 1 and "no" in err[0] and "No such file" in err[0]


def test_the_talk_of_another_model_is_refused(folder, tmp_path):
    for name, change in (("weights", {}), ("layers", {"num_hidden_layers": 3})):
        sizes = {"vocab_size": VOCAB_SIZE, "hidden_size": 24, "num_hidden_layers": 2} | change
        conversation = Conversation(models.make(sizes, seed=5), AutoTokenizer.from_pretrained(folder))
        conversation.say("one", max_new_tokens=2)
        conversation.save(tmp_path / name)
        for given in ([f"/load {tmp_path / name}"], []):
            options = () if given else ("--state", tmp_path / name)
            out, (line,) = talk(folder, *given, options=options, code=2)
            assert out == "" and "another model" in line and str(tmp_path / name) in line


@pytest.mark.parametrize(
    "options",
    [
        ["--temperature", "-1"],
        ["--seed", "x"],
        ["--device", "abacus"],
        ["--dtype", "int3"],
        ["--template", "x"],
        ["--warm"],
    ],
)
def test_a_wrong_option(folder, options):
    out, (line,) = talk(folder, "one", options=options, code=2)
    assert out == "" and line.startswith("Error: ") and options[0].lstrip("-") in line


def test_input_that_is_no_text(folder, monkeypatch):
    result = rwkv("chat", folder, "--max-new-tokens", NEW, stdin=b"one\ncaf\xe9\n")
    assert result.exit_code == 2 and "line 2" in result.stderr and "UTF-8" in result.stderr
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(CommandError, match="closed"):
        next(cli_chat._piped())


@pytest.mark.parametrize("is_terminal", [False, True])
def test_an_output_that_is_closed(folder, monkeypatch, is_terminal):
    monkeypatch.setattr(cli_chat, "_piped", lambda: iter(["one"]))
    monkeypatch.setattr(sys, "stdout", None)
    talk = cli_chat.Talk(Expected(folder).conversation, {}, max_new_tokens=NEW)
    with pytest.raises(CommandError, match="output is closed"):
        talk.run(is_terminal)


def test_a_template_that_cannot_be_used(copy):
    (copy / "chat_template.jinja").write_text("{{ messages | length }}")
    out, (line,) = talk(copy, "one", code=2)
    assert out == "" and line.startswith("Error: ") and "changes what was said before" in line


def test_the_model_in_the_box_is_the_default_and_no_chat_model(folder, monkeypatch):
    monkeypatch.setattr(generation, "demo_model_path", lambda: folder)
    expected = Expected(folder)
    expected.say("one")
    result = rwkv("chat", "--max-new-tokens", NEW, *SEED, stdin="one\n")
    assert result.stdout == expected.out
    (line,) = result.stderr.splitlines()
    assert "no chat" in line


def test_a_system_message_that_is_no_text(folder):
    out, (line,) = talk(folder, "one", options=("--system", "caf\udce9"), code=2)
    assert out == "" and line.startswith("Error: ") and r"\udce9" in line and "UTF-8" in line


# At a terminal


def test_at_a_terminal_what_is_no_text_does_not_end_the_talk(folder, monkeypatch, capsys):
    """Python decodes such bytes to stand-ins, or refuses them, as the locale says."""
    typed = ["one", "caf\udce9", UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "invalid"), "two", EOFError()]

    def type_on(prompt):
        if isinstance(typed[0], Exception):
            raise typed.pop(0)
        return typed.pop(0)

    monkeypatch.setattr("builtins.input", type_on)
    expected, greedy = Expected(folder, sampling={"do_sample": False}), {"do_sample": False}
    cli_chat.Talk(Expected(folder).conversation, greedy, max_new_tokens=NEW).run(is_terminal=True)
    expected.say("one")
    expected.say("two")
    out, err = capsys.readouterr()
    assert out == expected.out + "\n"
    errors = [line for line in err.splitlines() if line.startswith("Error: ")]
    assert len(errors) == 2 and all("UTF-8" in line for line in errors)


class Terminal:
    """`rwkv chat` as a person sees it."""

    def __init__(self, *arguments):
        self.ours, theirs = os.openpty()
        self.process = program("chat", *arguments, stdin=theirs, stdout=theirs, stderr=theirs)
        os.close(theirs)
        self.seen = b""

    def until(self, words):
        """Everything up to ``words``."""
        while words not in self.seen:
            assert select.select([self.ours], [], [], 60)[0], self.seen
            self.seen += os.read(self.ours, 4096)
        before, _, self.seen = self.seen.partition(words)
        return before

    def type(self, text):
        os.write(self.ours, text.encode())


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="the system has no terminals of this kind")
def test_at_a_terminal_errors_and_ctrl_c_do_not_end_the_talk(folder, tmp_path):
    terminal = Terminal(folder, "--max-new-tokens", "1000000", "--seed", "1")
    path = tmp_path / "talk"
    try:
        terminal.until(b"> ")
        terminal.type("the fox\n")
        terminal.until(b"fox\r\n")
        while not terminal.seen.strip():  # some of the answer
            terminal.seen += os.read(terminal.ours, 4096)
        terminal.process.send_signal(signal.SIGINT)
        terminal.until(b"> ")
        terminal.type(f"/save {path}\n")
        terminal.until(b"wrote ")
        terminal.until(b"> ")
        terminal.type("/what\n")
        assert b"there is no command /what" in terminal.until(b"> ")
        terminal.process.send_signal(signal.SIGINT)  # at the prompt
        terminal.type("\n/undo\n")
        terminal.until(b"Taken back: the fox")
        terminal.until(b"> ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.ours)
    *_, answer = messages(path)
    assert answer["role"] == "assistant" and answer["content"]
