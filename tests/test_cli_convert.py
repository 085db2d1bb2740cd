"""`rwkv convert`: there and back again, and what cannot be converted."""

import errno
import json
import os

import pytest
from commands import raiser, random_model, refused, rwkv, write_on  # noqa: F401 - fixtures

from modeling_rwkv import checkpoints


def test_there_and_back_again(folder, tmp_path):
    result = rwkv("convert", folder, tmp_path / "model.pth")
    assert (result.exit_code, result.stderr) == (0, "")
    assert str(tmp_path / "model.pth") in result.stdout and "hidden_size 24" in result.stdout
    result = rwkv("convert", tmp_path / "model.pth", tmp_path / "back", "--tokenizer", folder)
    assert (result.exit_code, result.stderr) == (0, "")
    assert str(tmp_path / "back" / "tokenizer.json") in result.stdout
    assert write_on(tmp_path / "back", "--seed", 1).stdout == write_on(folder, "--seed", 1).stdout


def test_options_of_a_conversion(folder, tmp_path):
    rwkv("convert", folder, tmp_path / "model.pth")
    options = ["--dtype", "bfloat16", "--context-length", 77, "--max-shard-size", "20KB"]
    result = rwkv("convert", tmp_path / "model.pth", tmp_path / "back", *options)
    assert result.exit_code == 0
    assert "bfloat16" in result.stdout and "model-00002-of-" in result.stdout
    assert "--tokenizer" in result.stderr  # there is none yet
    settings = json.loads((tmp_path / "back" / "config.json").read_text())
    assert (settings["context_length"], settings["dtype"]) == (77, "bfloat16")


def test_a_conversion_of_nothing(folder, tmp_path):
    (tmp_path / "empty.pth").touch()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    refused(rwkv("convert", tmp_path / "nothing", tmp_path / "out"), "nothing", "check the path")
    refused(rwkv("convert", tmp_path / "empty.pth", tmp_path / "out"), "empty.pth", "download")
    refused(rwkv("convert", folder, tmp_path / "out"), "out", ".pth")
    refused(rwkv("convert", folder, tmp_path / "no" / "out.pth"), tmp_path / "no", "mkdir")
    refused(rwkv("convert", folder, tmp_path / "out.pth", "--dtype", "int8"), "int8", "bfloat16")
    refused(rwkv("convert", folder, tmp_path / "out.pth", "--tokenizer", folder), "tokenizer")
    refused(rwkv("convert", folder, tmp_path / "out.pth", "--context-length", 0), "--context-length", 0)
    rwkv("convert", folder, tmp_path / "model.pth")
    refused(rwkv("convert", tmp_path / "model.pth", tmp_path / "full"), "full", "exists")
    refused(rwkv("convert", tmp_path / "model.pth", tmp_path / "out", "--max-shard-size", "big"), "big", "5GB")
    refused(rwkv("convert", folder), "DESTINATION", "rwkv convert --help")
    assert not (tmp_path / "out").exists() and not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize("place", ["while writing", "elsewhere"])
def test_no_space_left(folder, tmp_path, monkeypatch, place):
    """Said by the library, or by a system call that the library did not foresee."""
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    target = "save_torch_file" if place == "while writing" else "match_tensors"
    monkeypatch.setattr(checkpoints, target, raiser(error))
    line = refused(rwkv("convert", folder, tmp_path / "model.pth"), "space")
    assert "free some space" in line
    assert list(tmp_path.iterdir()) == []
