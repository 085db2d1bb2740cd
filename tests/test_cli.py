"""The `rwkv` command: its help, and what is no command of it."""

import importlib.metadata
import subprocess
import sys

import pytest
import typer
from commands import refused, rwkv

import modeling_rwkv
from modeling_rwkv import cli


@pytest.mark.parametrize("arguments", [["genrate", "Once"], ["--nonsense"], ["doctor", "who"]])
def test_a_wrong_command(arguments):
    refused(rwkv(*arguments), arguments[-1] if arguments[0] == "doctor" else arguments[0], "--help")


def test_version():
    assert rwkv("--version").stdout.split()[-1] == importlib.metadata.version("modeling-rwkv")


def test_help_names_every_command_and_option():
    overview = rwkv("--help")
    assert overview.exit_code == 0 and rwkv().stdout == overview.stdout
    group = typer.main.get_command(cli.app)
    for name, command in group.commands.items():
        result = rwkv(name, "--help")
        if name == "pretrain":  # its parser is that of the training programs
            assert result.exit_code == 0 and name in overview.stdout and "--train_file" in result.stdout
            continue
        assert (result.exit_code == 0 and name in overview.stdout and "Examples:" in result.stdout) or name == "doctor"
        for parameter in command.params:
            assert max(parameter.opts, key=len).upper() in result.stdout.upper()
        assert max(map(len, result.stdout.splitlines())) <= 80


def test_help_does_not_wait_for_torch(tmp_path):
    """The files of the command import neither torch nor transformers, nor do they for --help and --version."""
    code = (
        "import sys, types\n"
        "package = sys.modules['modeling_rwkv'] = types.ModuleType('modeling_rwkv')\n"  # which itself imports both
        f"package.__path__ = {modeling_rwkv.__path__!r}\n"
        "from modeling_rwkv.cli import app\n"
        "app(standalone_mode=False)\n"
        "assert not {'torch', 'transformers'} & sys.modules.keys()"
    )
    for arguments in ("--help", "--version", "generate --help", "convert --help", "merge --help", "finetune"):
        command = [sys.executable, "-c", code, *arguments.split()]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0 and done.stdout, done.stderr
