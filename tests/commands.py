"""What the tests of the `rwkv` command share: a small model to run it on, and ways to run it."""

import os
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path

import models
import pytest
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from modeling_rwkv import cli

VOCAB_SIZE = 257  # every byte, and the end of text


@pytest.fixture(name="folder", scope="session")
def random_model(tmp_path_factory):
    """A random model that writes random bytes: most of its characters are broken, some are of several tokens."""
    folder = tmp_path_factory.mktemp("cli") / "tiny"
    models.make({"vocab_size": VOCAB_SIZE, "hidden_size": 24, "num_hidden_layers": 2}).save_pretrained(folder)
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    ids = {letter: i for i, letter in enumerate(["<|endoftext|>", *letters])}
    tokenizer = Tokenizer(BPE(vocab=ids, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder)
    return folder


@pytest.fixture(name="copy")
def copied_model(folder, tmp_path):
    """The same, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def rwkv(*arguments, stdin=None):
    """The command in this process; an error that it has no sentence for comes out as it is."""
    options = {"input": stdin, "catch_exceptions": False, "prog_name": "rwkv"}
    return CliRunner().invoke(cli.app, list(map(str, arguments)), **options)


def write_on(folder, *arguments, prompt="Once", stdin=None, tokens=20):
    result = rwkv("generate", prompt, "--model", folder, "--max-new-tokens", tokens, *arguments, stdin=stdin)
    assert result.exit_code == 0, result.stderr
    return result


def refused(result, *words):
    """One line on standard error that names ``words``, nothing on standard output, exit code 2."""
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    (line,) = result.stderr.splitlines()
    assert line.startswith("Error: ") and "Traceback" not in line
    for word in words:
        assert str(word) in line, line
    return line


def program(*arguments, **options):
    """The command as a process of its own."""
    command = [sys.executable, "-m", "modeling_rwkv.cli", *map(os.fsencode, arguments)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    return subprocess.Popen(
        command,
        env=environment | {"OMP_NUM_THREADS": "1"},
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),  # which a shell's background jobs ignore
        **{"stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options,
    )


def raiser(error):
    def fail(*args, **kwargs):
        raise error

    return fail
