"""Long prompts on the command line: in pieces, with a bar where somebody watches."""

import json
import os
import select
import signal
import sys
from functools import partial
from pathlib import Path

import pytest
from commands import copied_model, program, random_model, rwkv, write_on  # noqa: F401 - fixtures
from huggingface_hub.utils import disable_progress_bars, enable_progress_bars
from transformers import AutoModelForCausalLM, AutoTokenizer

from modeling_rwkv import RwkvForCausalLM, RwkvModel, cli, cli_chat, prefill
from modeling_rwkv.chat import Conversation
from modeling_rwkv.cli_base import shows_progress

PIECE = 32
LONG = "Once upon a time, " * 9


@pytest.fixture(autouse=True)
def short_pieces(monkeypatch):
    monkeypatch.setattr(RwkvForCausalLM, "prefill_tokens", PIECE)


@pytest.fixture(name="watched")
def somebody_watches(monkeypatch):
    """Who sees every step, however quick."""
    for module in (cli, cli_chat):
        monkeypatch.setattr(module, "shows_progress", lambda: True)
    monkeypatch.setattr(prefill, "tqdm", partial(prefill.tqdm, mininterval=0, miniters=1))


def library(folder):
    return AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def test_a_long_prompt_goes_on_as_with_generate(folder, monkeypatch):
    """And is read once."""
    lengths, forward = [], RwkvModel.forward

    def recorded(self, input_ids, **kwargs):
        lengths.append(input_ids.shape[1])
        return forward(self, input_ids, **kwargs)

    monkeypatch.setattr(RwkvModel, "forward", recorded)
    model, tokenizer = library(folder)
    for prompt in (LONG, LONG[:PIECE], LONG[: PIECE + 1]):
        output = model.generate(**tokenizer(prompt, return_tensors="pt"), do_sample=False, max_new_tokens=20)
        lengths.clear()
        assert write_on(folder, "--temperature", 0, prompt=prompt).stdout == tokenizer.decode(output[0]) + "\n"
        read = [length for length in lengths if length > 1]
        assert sum(read) == len(prompt) and max(read) <= PIECE


def test_a_model_that_asks_for_a_static_cache_goes_on_too(copy):
    expected = [write_on(copy, "--temperature", 0, prompt=prompt).stdout for prompt in ("Once", LONG)]
    talk = ("chat", copy, "--temperature", 0, "--max-new-tokens", 5)
    expected.append(rwkv(*talk, stdin=b"x\n").stdout)
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(settings | {"cache_implementation": "static"}))
    found = [write_on(copy, "--temperature", 0, prompt=prompt).stdout for prompt in ("Once", LONG)]
    assert [*found, rwkv(*talk, stdin=b"x\n").stdout] == expected


def test_a_bar_shows_how_much_of_a_long_prompt_is_read(folder, watched):
    expected = write_on(folder, "--temperature", 0, prompt=LONG[:PIECE])
    assert "reading" not in expected.stderr
    shown = write_on(folder, "--temperature", 0, prompt=LONG)
    assert "reading: 100%" in shown.stderr and "reading" not in shown.stdout
    assert shown.stderr.splitlines()[-1].endswith("tokens/s")


@pytest.mark.parametrize("options", [(), ("--json",)], ids=["text", "json"])
def test_where_nobody_watches_there_is_no_bar(folder, options):
    assert "reading" not in write_on(folder, "--temperature", 0, *options, prompt=LONG).stderr


def test_bars_may_be_switched_off_as_all_of_hugging_face(folder, watched):
    disable_progress_bars()
    try:
        assert "reading" not in write_on(folder, prompt=LONG).stderr
    finally:
        enable_progress_bars()


def test_a_long_message_has_a_bar(folder, watched):
    answer = Conversation(*library(folder)).say(LONG, max_new_tokens=5, do_sample=False)
    options = ("--temperature", 0, "--max-new-tokens", 5)
    result = rwkv("chat", folder, *options, stdin=f"{LONG}\n".encode())
    assert result.stdout == answer + "\n" and "reading: 100%" in result.stderr
    assert "reading" not in rwkv("chat", folder, *options, stdin=b"x\n").stderr


def test_somebody_watches_a_terminal(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    assert not shows_progress()
    with Path(os.devnull).open("w") as nobody:
        monkeypatch.setattr(sys, "stderr", nobody)
        assert not shows_progress()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="the system has no terminals of this kind")
def test_ctrl_c_ends_the_reading(folder, tmp_path):
    """At a terminal, with the exit code of a program that was interrupted and nothing said."""
    path = tmp_path / "prompt"
    path.write_text("x" * 2_000_000)
    ours, theirs = os.openpty()
    termios = pytest.importorskip("termios")
    termios.tcsetwinsize(theirs, (24, 80))  # without a width there is no room for a bar
    seen = b""
    with path.open("rb") as prompt:
        process = program("generate", "-", "--model", folder, stdin=prompt, stderr=theirs)
    os.close(theirs)
    try:
        while b"reading" not in seen:
            assert select.select([ours], [], [], 60)[0] and process.poll() is None, seen
            seen += os.read(ours, 4096)
        process.send_signal(signal.SIGINT)
        assert process.stdout.read() == b""
        assert process.wait(timeout=60) == 130
        while select.select([ours], [], [], 0)[0]:
            try:
                seen += os.read(ours, 4096)
            except OSError:  # Linux: all has been read
                break
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        os.close(ours)
    assert b"Traceback" not in seen and b"Error" not in seen
