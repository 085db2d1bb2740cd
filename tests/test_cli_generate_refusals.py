"""`rwkv generate`: one line with a cure for everything that people get wrong."""

import errno
import json
import os
import sys
from pathlib import Path

import models
import pytest
import torch
from commands import copied_model, raiser, random_model, refused, rwkv  # noqa: F401 - fixtures
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import modeling_rwkv
from modeling_rwkv import cli, generation


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--temperature", "-0.5"], ["--temperature", "-0.5"]),
        (["--temperature", "nan"], ["--temperature", "nan"]),
        (["--temperature", "1e-9"], ["--temperature", "1e-9"]),
        (["--temperature", "warm"], ["--temperature", "warm"]),
        (["--top-p", "0"], ["--top-p", "0"]),
        (["--top-p", "1.01"], ["--top-p", "1.01"]),
        (["--top-k", "0"], ["--top-k", "0"]),
        (["--top-k", "2.5"], ["--top-k", "2.5"]),
        (["--max-new-tokens", "0"], ["--max-new-tokens", "0"]),
        (["--max-new-tokens", "many"], ["--max-new-tokens", "many"]),
        (["--seed", "-1"], ["--seed", "-1"]),
        (["--seed", str(2**64)], ["--seed", 2**64]),
        (["--dtype", "int8"], ["int8", "bfloat16"]),
        (["--device", "abacus"], ["abacus", "cpu"]),
        (["--device", "meta"], ["meta", "cpu"]),
        (["--device", "cpu:1"], ["cpu:1"]),
        (["--device", "cuda:99"], ["cuda:99"]),
        (["--warm"], ["--warm", "rwkv generate --help"]),
        (["--model"], ["--model"]),
        (["another"], ["another"]),
    ],
    ids=lambda x: " ".join(map(str, x)),
)
def test_a_wrong_option(folder, arguments, words):
    refused(rwkv("generate", "Once", "--model", folder, *arguments), *words)


def test_cuda_without_cuda(folder, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available: None)
    refused(rwkv("generate", "Once", "--model", folder, "--device", "cuda"), "'cuda'")


@pytest.mark.parametrize("prompt", ["", " \n\t ", "\u3000"])
def test_an_empty_prompt(prompt):
    refused(rwkv("generate", prompt), "empty", repr(prompt))
    refused(rwkv("generate", "-", stdin=prompt.encode() + b"\n"), "empty")


def test_no_prompt():
    refused(rwkv("generate"), "PROMPT", "rwkv generate --help")
    refused(rwkv("generate", "-", stdin=b""), "empty")


def test_input_that_is_no_text():
    refused(rwkv("generate", "-", stdin="déjà vu".encode("latin-1")), "UTF-8", "0xe9")
    refused(rwkv("generate", "-", stdin="Once".encode("utf-16")), "UTF-8")


def test_no_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)
    with pytest.raises(cli.CommandError, match="closed"):
        cli._check_prompt("-")


def test_a_prompt_without_tokens(copy):
    path = copy / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"Regex": ".*"}, "content": ""}
    path.write_text(json.dumps(tokenizer))
    refused(rwkv("generate", "Once", "--model", copy), "'Once'")


@pytest.mark.parametrize(
    "name", ["no/such/folder", "./nothing", "/nothing", "no-such-model", "no/such-model", "a--b/c"]
)
def test_no_such_model(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    refused(rwkv("generate", "Once", "--model", name), name)


def test_no_model_in_the_box(tmp_path, monkeypatch):
    monkeypatch.setattr(generation, "demo_model_path", lambda: tmp_path / "demo")
    refused(rwkv("generate", "Once"), tmp_path / "demo", "--model")


def test_a_file_is_no_model(tmp_path):
    (tmp_path / "model.pth").touch()
    refused(rwkv("generate", "Once", "--model", tmp_path / "model.pth"), "model.pth", "rwkv convert")
    refused(rwkv("generate", "Once", "--model", __file__), __file__)


def test_a_folder_that_is_no_model(tmp_path):
    refused(rwkv("generate", "Once", "--model", tmp_path), tmp_path, "config.json")


@pytest.mark.parametrize("content", ["", "{", "[]", "\xff"])
def test_a_damaged_config(copy, content):
    (copy / "config.json").write_bytes(content.encode("latin-1"))
    refused(rwkv("generate", "Once", "--model", copy), "config.json")


@pytest.mark.parametrize(("settings", "word"), [({"model_type": "rwkv6"}, "rwkv6"), ({}, "None")])
def test_another_kind_of_model(copy, settings, word):
    (copy / "config.json").write_text(json.dumps(settings))
    refused(rwkv("generate", "Once", "--model", copy), copy, word, "RWKV-4")


@pytest.mark.parametrize("change", [{"hidden_size": 0}, {"hidden_size": 25}, {"num_hidden_layers": 3}])
def test_a_config_that_says_something_else_than_the_weights(copy, change):
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | change))
    refused(rwkv("generate", "Once", "--model", copy), copy)


def test_a_tokenizer_of_another_model(copy):
    models.make({"vocab_size": 60, "hidden_size": 24, "num_hidden_layers": 2}).save_pretrained(copy)
    refused(rwkv("generate", "zzz", "--model", copy), "60", "tokenizer")


@pytest.mark.parametrize("missing", ["model.safetensors", "tokenizer.json"])
def test_a_folder_that_lacks_a_file(copy, missing):
    (copy / missing).unlink()
    refused(rwkv("generate", "Once", "--model", copy), copy, missing)


@pytest.mark.parametrize("damaged", ["model.safetensors", "tokenizer.json", "tokenizer_config.json"])
@pytest.mark.parametrize("keep", [0.5, 0])
def test_a_damaged_file(copy, damaged, keep):
    path = copy / damaged
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * keep)])
    refused(rwkv("generate", "Once", "--model", copy), copy, "again")


def test_damaged_pickles(copy):
    (copy / "model.safetensors").unlink()
    for content in (b"", b"PK\x03\x04", b"\x80\x02", b"nothing"):
        (copy / "pytorch_model.bin").write_bytes(content)
        refused(rwkv("generate", "Once", "--model", copy), copy, "weights")


def test_weights_without_a_tensor(copy):
    """transformers would put random numbers in its place."""
    weights = load_file(copy / "model.safetensors")
    del weights["rwkv.blocks.1.ln2.bias"]
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    refused(rwkv("generate", "Once", "--model", copy), "rwkv.blocks.1.ln2.bias")


def test_weights_that_are_not_finite(copy):
    weights = load_file(copy / "model.safetensors")
    weights["head.weight"][:] = torch.nan
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    result = rwkv("generate", "Once", "--model", copy)
    assert result.exit_code == 2
    assert "not finite" in result.stderr and result.stderr.count("\n") == 1


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_folder_where_a_file_should_be(copy, name):
    (copy / name).unlink()
    (copy / name).mkdir()
    refused(rwkv("generate", "Once", "--model", copy), copy)


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may read everything")
@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors", "."])
def test_a_file_that_may_not_be_read(copy, name):
    (copy / name).chmod(0)
    try:
        refused(rwkv("generate", "Once", "--model", copy), copy, "ermission")
    finally:
        (copy / name).chmod(0o700)


def test_permission_denied(folder, monkeypatch):
    error = PermissionError(errno.EACCES, os.strerror(errno.EACCES), "a/file")
    monkeypatch.setattr(Path, "read_text", raiser(error))
    refused(rwkv("generate", "Once", "--model", folder), "a/file", "Permission denied", "permissions")


@pytest.mark.parametrize("name", ["tokenizer.json", "model.safetensors"])
def test_permission_denied_to_a_library(folder, monkeypatch, name):
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != name)
    refused(rwkv("generate", "Once", "--model", folder), folder / name, "Permission denied", "permissions")


@pytest.mark.parametrize("error", [MemoryError(), torch.OutOfMemoryError("CUDA out of memory. Tried\nto")])
def test_a_model_too_large(folder, monkeypatch, error):
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", raiser(error))
    refused(rwkv("generate", "Once", "--model", folder), "too large", "bfloat16")


def test_our_own_mistakes_are_not_hidden(folder, monkeypatch):
    monkeypatch.setattr(modeling_rwkv.RwkvForCausalLM, "generate", raiser(RuntimeError("a bug")))
    with pytest.raises(RuntimeError, match="a bug"):
        rwkv("generate", "Once", "--model", folder)


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(place, tmp_path):
    path = str(tmp_path / "nothing")
    arguments = ["--debug", "Once"] if place == "before" else ["Once", "--debug"]
    result = rwkv("generate", "--model", path, *arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("Error: ")
