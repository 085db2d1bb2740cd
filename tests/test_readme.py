"""README.md tells the truth: its Python blocks and its commands are run here.

Python blocks run in one namespace, in the order of the page. In shell blocks, lines that
start with a command in RUN run as they stand; commands that set something up are checked, not run.
A block is left out only by a comment on the line before it: <!-- not run: the reason -->
"""

import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"

BLOCK = re.compile(
    r"^(?:<!-- not run:(?P<reason>.*?)-->\n)?```(?P<language>\w+)\n(?P<body>.*?)^```$",
    re.MULTILINE | re.DOTALL,
)
SHELLS = {"bash", "sh", "shell", "console"}


@dataclass
class Block:
    language: str
    body: str
    line: int
    reason: str | None  # why it is not run


def blocks() -> list[Block]:
    text = README.read_text()
    found = []
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start("body")) + 1
        found.append(Block(match["language"], match["body"], line, match["reason"]))
    return found


def commands(block: Block) -> list[str]:
    """Commands of a shell block: in `console` blocks the lines after a `$`, else every line."""
    lines = block.body.replace("\\\n", " ").splitlines()
    if block.language == "console":
        lines = [line[2:] for line in lines if line.startswith("$ ")]
    return [line for line in lines if line.strip() and not line.startswith("#")]


def left_in(*languages: str) -> list[Block]:
    return [block for block in blocks() if block.language in languages and block.reason is None]


def check_make(*arguments: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    for target in arguments:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), f"no target {target}"


def check_pip(action: str, *arguments: str) -> None:
    assert action == "install"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for extras in re.findall(r"\[(.*?)\]", " ".join(arguments)):
        assert set(extras.split(",")) <= project["optional-dependencies"].keys()


def check_git(action: str, *_: str) -> None:
    assert action == "clone"


def check_cd(_: str) -> None:
    pass


RUN = {"rwkv", "echo"}

# These change the machine or need the network, so they are looked at and not run.
CHECKED = {"make": check_make, "pip": check_pip, "git": check_git, "cd": check_cd}


def test_there_is_something_to_run():
    assert left_in("python"), "README.md has no Python block"
    shown = [command for block in left_in(*SHELLS) for command in commands(block)]
    assert any(command.startswith("rwkv ") for command in shown), "README.md shows no rwkv command"


def test_every_block_left_out_says_why():
    for block in blocks():
        assert block.reason is None or block.reason.strip(), f"README.md:{block.line}"
    fences = re.findall(r"^ *```\w+$", README.read_text(), re.MULTILINE)
    assert len(fences) == len(blocks()), "a fence is not closed, or not read by this test"


def test_python_blocks(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "readme"}
    for block in left_in("python"):
        padded = "\n" * (block.line - 1) + block.body  # so that a traceback names README's line
        exec(compile(padded, str(README), "exec"), namespace)


def run(command: str, folder: Path) -> None:
    done = subprocess.run(
        ["bash", "-o", "pipefail", "-c", command],
        cwd=folder,
        env=os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr}"


@pytest.mark.parametrize("block", left_in(*SHELLS), ids=lambda block: f"line{block.line}")
def test_shell_block(block, tmp_path):
    for command in commands(block):
        program, *arguments = shlex.split(command, comments=True)
        if program in CHECKED:
            CHECKED[program](*arguments)
        elif program in RUN:
            run(command, tmp_path)
        else:
            pytest.fail(f"{program!r} is in neither RUN nor CHECKED of this test")
