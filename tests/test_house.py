"""Laws about the house: what may import what, what an import may do, and what is shipped."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())

# Each room and the name it is imported by, from the ground up: a room may import those before it.
ROOMS = {
    "kernels": "rwkv_kernels",
    "modeling_rwkv": "modeling_rwkv",
    "eval": "rwkv_eval",
    "finetune": "rwkv_finetune",
}
PACKAGES = list(ROOMS.values())
FOLDERS = {"kernels", "eval", "finetune", "benchmarks", "tests"}  # nobody imports by these

# The command stands above the rooms; test_import_is_inert holds it to importing them late.
COMMAND = ROOT / "modeling_rwkv" / "cli.py"


def sources(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def imports(path: Path) -> set[str]:
    """First parts of the absolute names that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            names.add(node.module.split(".")[0])
    return names


def run_python(code: str, cwd: Path, **env: str) -> str:
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=cwd, env=os.environ | env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def shipped_files() -> list[Path]:
    """Every file in a room that belongs to the repository, or would on the next commit."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", *ROOMS]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in done.stdout.splitlines() if (ROOT / name).is_file()]


@pytest.mark.parametrize("room", ROOMS)
def test_imports_point_downwards(room):
    above = PACKAGES[PACKAGES.index(ROOMS[room]) + 1 :]
    for path in sources(room):
        if path != COMMAND:
            upwards = imports(path) & (FOLDERS | set(above))
            assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}"


def test_the_operator_knows_no_transformers():
    for path in sources("kernels"):
        assert "transformers" not in imports(path), path


@pytest.mark.parametrize("room", ["kernels", "eval", "finetune"])
def test_a_room_shadows_no_package_of_its_name(room, tmp_path):
    """A python started in this repository must still find Hugging Face's `kernels`."""
    other = tmp_path / room / "__init__.py"
    other.parent.mkdir()
    other.touch()
    found = run_python(f"import {room}; print({room}.__file__)", ROOT, PYTHONPATH=str(tmp_path))
    assert Path(found.strip()) == other


@pytest.mark.parametrize("package", PACKAGES)
def test_a_package_is_found_from_any_folder(package, tmp_path):
    run_python(f"import {package}", tmp_path)


INERT = """
import sys
import torch, transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationMixin, PreTrainedModel

forbidden = ("subprocess.Popen", "os.system", "os.exec", "socket.connect", "socket.getaddrinfo")

def refuse(event, args):
    if event.startswith(forbidden):
        raise AssertionError(f"importing did {event}{args}")
    if event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+"):
        raise AssertionError(f"importing wrote {args}")

sys.addaudithook(refuse)
import modeling_rwkv, modeling_rwkv.cli

assert not torch.cuda.is_initialized()
for name in ("rwkv_eval", "rwkv_finetune", "torch.utils.cpp_extension", "datasets", "peft"):
    assert name not in sys.modules, name
"""


def test_import_is_inert(tmp_path):
    """It starts no program, opens no connection, writes no file, and leaves CUDA alone."""
    run_python(INERT, tmp_path, PYTHONDONTWRITEBYTECODE="1")


def declared(*extras: str) -> set[str]:
    """Names of the distributions that the package, with these extras, asks for."""
    project = PYPROJECT["project"]
    lines = list(project["dependencies"])
    for extra in extras:
        lines += project["optional-dependencies"][extra]
    return {re.match(r"[\w.-]+", line)[0].lower().replace("_", "-") for line in lines}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_are_declared(room):
    """What a room imports is a dependency, so that an installation without [dev] works."""
    extras = {
        "eval": ["eval"],
        "finetune": ["finetune", "quantize"],
        "kernels": ["cuda"],
    }  # what a room may do without
    asked_for = declared(*extras.get(room, []))
    providers = importlib.metadata.packages_distributions()
    ours = set(PACKAGES) | set(sys.stdlib_module_names)
    for path in sources(room):
        for name in imports(path) - ours:
            dists = {dist.lower().replace("_", "-") for dist in providers.get(name, [name])}
            assert dists & asked_for, f"{path.relative_to(ROOT)} imports {name}"


def pins(file: str) -> dict[str, str]:
    lines = (ROOT / file).read_text().splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {name.lower().replace("_", "-"): version for name, version in pairs}


def test_every_dependency_is_pinned():
    ours = {"modeling-rwkv"}  # an extra may name another
    assert declared("cuda", "eval", "finetune", "test", "dev") - ours <= pins("constraints.txt").keys()
    assert declared("cuda", "eval", "finetune", "test") - ours <= pins("constraints-oldest.txt").keys()


def test_both_ends_of_the_transformers_range_are_tested():
    (spec,) = (d for d in PYPROJECT["project"]["dependencies"] if d.startswith("transformers"))
    oldest, next_major = re.fullmatch(r"transformers>=(\d+\.\d+),<(\d+)", spec).groups()
    assert pins("constraints-oldest.txt")["transformers"].startswith(oldest + ".")
    assert int(pins("constraints.txt")["transformers"].split(".")[0]) == int(next_major) - 1


def test_the_wheel_holds_every_file_of_the_rooms(tmp_path):
    """Built in a copy, without the network, as `pip install .` would build it."""
    files = shipped_files()
    for file in [*files, Path("pyproject.toml"), Path("README.md"), Path("LICENSE")]:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / file, tmp_path / file)
    run_python(
        "from setuptools import build_meta; build_meta.build_wheel('dist')",
        tmp_path,
        PYTHONWARNINGS="ignore",
    )
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    for file in files:
        room, *rest = file.parts
        assert "/".join([ROOMS[room], *rest]) in inside
