"""The `rwkv` command: what it prints and where, and one line with a cure for everything that people get wrong."""

import errno
import importlib.metadata
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path

import models
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast
from typer.testing import CliRunner

import modeling_rwkv
from modeling_rwkv import checkpoints, cli, doctor, generation
from rwkv_kernels import wkv4
from rwkv_kernels.build_cache import KernelWarning

VOCAB_SIZE = 257  # every byte, and the end of text


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
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


@pytest.fixture
def copy(folder, tmp_path):
    """The same, to be damaged."""
    return Path(shutil.copytree(folder, tmp_path / "copy"))


def rwkv(*arguments, stdin=None):
    return CliRunner().invoke(cli.app, list(map(str, arguments)), input=stdin, prog_name="rwkv")


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


# -- generate --------------------------------------------------------------------------------------


def test_greedy_is_generate(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("Once", return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    expected = tokenizer.decode(output[0], skip_special_tokens=True)
    result = write_on(folder, "--temperature", 0, tokens=40)
    assert result.stdout == expected + "\n"
    assert "40 tokens" in result.stderr and "tokens/s" in result.stderr and "seed" not in result.stderr


def test_sampling_is_generate(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    torch.manual_seed(7)
    settings = {"do_sample": True, "temperature": 1.3, "top_p": 0.7, "top_k": 9}
    output = model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=40, **settings)
    result = write_on(folder, "--temperature", 1.3, "--top-p", 0.7, "--top-k", 9, "--seed", 7, tokens=40)
    assert result.stdout == tokenizer.decode(output[0], skip_special_tokens=True) + "\n"


def test_a_seed_writes_the_same_again(folder):
    first = write_on(folder)
    seed = first.stderr.split("--seed ")[1].strip()
    assert write_on(folder, "--seed", seed).stdout == first.stdout
    assert write_on(folder, "--seed", int(seed) + 1).stdout != first.stdout
    assert write_on(folder).stdout != first.stdout
    write_on(folder, "--seed", 2**64 - 1)


def test_top_k_of_one_is_greedy(folder):
    assert write_on(folder, "--top-k", 1).stdout == write_on(folder, "--temperature", 0).stdout


@pytest.mark.parametrize("prompt", ["Il était une fois", "從前有一", "🙂\n\n🙂 ", "\u00a0x\ufffd", "- a dash"])
def test_the_prompt_comes_out_as_it_went_in(folder, prompt):
    given = rwkv("generate", "--model", folder, "--max-new-tokens", 3, "--", prompt)
    assert given.exit_code == 0 and given.stdout.startswith(prompt)
    piped = write_on(folder, "--json", prompt="-", stdin=prompt.encode() + b"\n")
    assert json.loads(piped.stdout)["prompt"] == prompt


def test_json(folder):
    result = write_on(folder, "--json", "--seed", 3, "--top-k", 50)
    found = json.loads(result.stdout)
    assert result.stderr == ""
    assert found["text"] == found["prompt"] + found["continuation"]
    assert found["text"] + "\n" == write_on(folder, "--seed", 3, "--top-k", 50).stdout
    asked = {"prompt": "Once", "model": str(folder), "max_new_tokens": 20, "temperature": 0.8, "top_p": 0.9}
    asked |= {"top_k": 50, "seed": 3, "device": "cpu", "dtype": "float32", "prompt_tokens": 4, "tokens": 20}
    assert found.items() >= asked.items()
    assert found["seconds"] > 0 and found["tokens_per_second"] > 0
    assert json.loads(write_on(folder, "--json", "--temperature", 0).stdout)["seed"] is None


def test_the_end_of_text_ends_it(copy):
    weights = load_file(copy / "model.safetensors")
    weights["head.weight"][:] = 0  # all tokens are as likely, and the first is the end of text
    save_file(weights, copy / "model.safetensors", metadata={"format": "pt"})
    for name in ("config.json", "generation_config.json"):
        settings = json.loads((copy / name).read_text())
        (copy / name).write_text(json.dumps(settings | {"eos_token_id": 0}))
    found = json.loads(write_on(copy, "--json", "--temperature", 0).stdout)
    assert (found["tokens"], found["continuation"]) == (1, "")


def test_the_longest_prompt_is_no_longer_than_any(copy):
    """A recurrent model has no context window; the one in the config is what it was trained at."""
    settings = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(settings | {"context_length": 8}))
    assert write_on(copy, prompt="word " * 40).stderr.count("\n") == 1


def test_on_the_cpu_it_is_float32_unless_asked(copy):
    models.make(
        {"vocab_size": VOCAB_SIZE, "hidden_size": 24, "num_hidden_layers": 2}, dtype=torch.bfloat16
    ).save_pretrained(copy)
    assert json.loads(write_on(copy, "--json").stdout)["dtype"] == "float32"
    assert json.loads(write_on(copy, "--json", "--dtype", "bfloat16").stdout)["dtype"] == "bfloat16"
    assert generation.find_dtype("auto", torch.device("cuda")) == "auto"


def test_a_small_model_takes_one_thread_and_gives_the_others_back(folder, monkeypatch):
    model, tokenizer = generation.load(str(folder), torch.device("cpu"), torch.float32)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        for smallest, expected in ((generation.SMALL_MODEL, 1), (0, 2)):
            monkeypatch.setattr(generation, "SMALL_MODEL", smallest)
            seen = []
            greedy = generation.Sampling(temperature=0, top_p=1, top_k=None, seed=None)
            generation.generate(
                model, tokenizer, "Once", 3, greedy, lambda _, seen=seen: seen.append(torch.get_num_threads())
            )
            assert seen[0] == 2 and set(seen[1:]) == {expected} and torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_what_transformers_says_is_left_out(copy):
    """Unless it is asked for; and the settings of a program that calls the command stay as they were."""

    def state():
        return generation.logging.get_verbosity(), generation.logging.is_progress_bar_enabled()

    generation.logging.set_verbosity_warning()
    generation.logging.enable_progress_bar()
    settings = json.loads((copy / "generation_config.json").read_text())
    (copy / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.5}))  # not with do_sample
    assert write_on(copy, "--temperature", 0).stderr.count("\n") == 1
    assert state() == (generation.logging.WARNING, True)
    with generation.quiet(debug=True):
        assert state() == (generation.logging.WARNING, True)
    with warnings.catch_warnings(action="error"), generation.quiet():
        assert state() == (generation.logging.ERROR, False)
        warnings.warn("advice", stacklevel=1)
    assert state() == (generation.logging.WARNING, True)


def test_a_command_tells_of_kernels_that_cannot_be_had_in_one_line(capsys):
    with generation.quiet():
        warnings.warn("No compiler. Install one.", KernelWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: No compiler. Install one.\n"


@pytest.mark.parametrize("seed", range(5))
def test_pieces_are_whole_characters_and_add_up(folder, seed):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "aé從🙂\n " * 3
    ids = tokenizer(text)["input_ids"]
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randint(1, VOCAB_SIZE, (30,), generator=generator).tolist()
    for tokens, whole in [(ids, True), (noise, False), (noise + ids, False), (ids + noise, False)]:
        pieces = []
        streamer = generation.TextPieces(tokenizer, pieces.append)
        streamer.put(torch.tensor([tokens[:1]]))
        for token in tokens[1:]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert tokenizer.decode(tokens[:1]) + "".join(pieces) == tokenizer.decode(tokens)
        if whole:
            assert pieces == list(text[1:])  # each as soon as its last byte is there


def test_pieces_keep_the_spaces_between_them():
    """Of tokenizers that leave out the space at the beginning of what they decode."""
    words = {"▁once": 0, "▁upon": 1, "▁a": 2, "▁time": 3}
    tokenizer = Tokenizer(BPE(vocab=words, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    pieces = []
    streamer = generation.TextPieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer), pieces.append)
    streamer.put(torch.tensor([[0]]))
    for token in (1, 2, 3, 3):
        streamer.put(torch.tensor([token]))
    streamer.end()
    assert pieces == [" upon", " a", " time", " time"]


def test_text_is_written_as_it_comes(folder, monkeypatch):
    """In the order: prompt, pieces, line break; each before the next token is computed."""
    events = []
    forward = modeling_rwkv.RwkvForCausalLM.forward

    def logged_forward(*args, **kwargs):
        events.append(None)
        return forward(*args, **kwargs)

    monkeypatch.setattr(modeling_rwkv.RwkvForCausalLM, "forward", logged_forward)
    monkeypatch.setattr(cli, "write", events.append)
    write_on(folder, "--temperature", 0, tokens=30)
    assert events[:2] == ["Once", None] and events[-1] == "\n"
    written = [i for i, event in enumerate(events) if event]
    assert len(written) > 10 and all(events[i - 1] is None for i in written[1:-2])


def test_output_reaches_the_reader_at_once(folder):
    """Of a program whose output is a pipe, which Python would buffer; and stopping it leaves no traceback."""
    with program("generate", "Once", "--model", folder, "--max-new-tokens", "1000000") as process:
        seen = [os.read(process.stdout.fileno(), 4096) for _ in range(5)]
        assert process.poll() is None and seen[0].startswith(b"Once")
        assert all(0 < len(part) < 1024 for part in seen)  # Python's buffer is larger
        process.send_signal(signal.SIGINT)
        _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130
    assert stderr.strip() == b""


def test_a_reader_that_leaves_is_no_error(folder):
    with program("generate", "Once", "--model", folder, "--max-new-tokens", "1000000") as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 1


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="the system has no full device")
def test_a_full_disk_behind_the_output(folder):
    with open("/dev/full", "wb") as full, program("generate", "Once", "--model", folder, stdout=full) as process:
        (line,) = process.stderr.read().decode().splitlines()
    assert process.returncode == 2
    assert "No space left" in line and "Traceback" not in line


def test_bytes_that_are_no_text():
    with program("generate", b"caf\xe9") as process:
        stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (2, b"")
    assert b"not UTF-8" in stderr and stderr.count(b"\n") == 1


# -- what people get wrong -------------------------------------------------------------------------


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


def test_a_name_on_the_hub_reaches_transformers(folder, monkeypatch):
    """What is no folder here is asked for by the same calls that a program makes."""
    asked = []

    def redirect(owner, method):
        original = getattr(owner, method).__func__

        def from_hub(cls, name, *args, **kwargs):
            asked.append(name)
            return original(cls, folder if name == "some/model" else name, *args, **kwargs)

        monkeypatch.setattr(owner, method, classmethod(from_hub))

    for owner in (AutoTokenizer, AutoModelForCausalLM):
        redirect(owner, "from_pretrained")
    redirect(generation.PretrainedConfig, "get_config_dict")
    assert write_on("some/model", "--temperature", 0).stdout == write_on(folder, "--temperature", 0).stdout
    assert asked.count("some/model") == 3


def test_the_model_in_the_box_is_the_default(folder, monkeypatch):
    monkeypatch.setattr(generation, "demo_model_path", lambda: folder)
    result = rwkv("generate", "Once", "--seed", 1)
    assert (result.exit_code, result.stdout) == (0, write_on(folder, "--seed", 1, tokens=200).stdout)


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


def raiser(error):
    def fail(*args, **kwargs):
        raise error

    return fail


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
    assert isinstance(rwkv("generate", "Once", "--model", folder).exception, RuntimeError)


@pytest.mark.parametrize("place", ["before", "after"])
def test_debug_shows_the_traceback(place, tmp_path):
    path = str(tmp_path / "nothing")
    arguments = ["--debug", "Once"] if place == "before" else ["Once", "--debug"]
    result = rwkv("generate", "--model", path, *arguments)
    assert result.exit_code == 2
    assert "Traceback" in result.stderr and result.stderr.splitlines()[-1].startswith("Error: ")


@pytest.mark.parametrize("arguments", [["genrate", "Once"], ["--nonsense"], ["doctor", "who"]])
def test_a_wrong_command(arguments):
    refused(rwkv(*arguments), arguments[-1] if arguments[0] == "doctor" else arguments[0], "--help")


# -- convert ---------------------------------------------------------------------------------------


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
    target = "save_torch_file" if place == "while writing" else "_match"
    monkeypatch.setattr(checkpoints, target, raiser(error))
    line = refused(rwkv("convert", folder, tmp_path / "model.pth"), "space")
    assert "free some space" in line
    assert list(tmp_path.iterdir()) == []


# -- doctor ----------------------------------------------------------------------------------------


def test_doctor():
    result = rwkv("doctor")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "FAIL" not in result.stdout and result.stdout.count("PASS") >= 4
    for word in (torch.__version__, "transformers", "cpu", *wkv4.BACKENDS):
        assert word in result.stdout


@pytest.fixture
def one_thread():
    """On a busy machine threads wait for each other, and time says nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_doctor_as_json():
    result = rwkv("doctor", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["passed"]) == (0, True)
    cpu = found["devices"][0]
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        assert cpu["wkv"][dtype] == wkv4.choose_backend(torch.empty(1, 2, 8, dtype=getattr(torch, dtype)))
    assert set(cpu["wkv"].values()) | set(cpu["not_wkv"]) == set(wkv4.BACKENDS)
    assert found["versions"]["torch"] == torch.__version__


def test_doctor_says_why_an_implementation_does_not_run(monkeypatch):
    original = wkv4.wkv4

    def operator(*args, backend="auto"):
        return (
            raiser(RuntimeError("no wires\nin this house"))()
            if backend == "abacus"
            else original(*args, backend=backend)
        )

    monkeypatch.setitem(wkv4.BACKENDS, "abacus", "beads on wires")
    monkeypatch.setattr(doctor.operator, "wkv4", operator)
    assert "beads" not in json.dumps(doctor.examine()["devices"][0]["wkv"])
    assert doctor.examine()["devices"][0]["not_wkv"]["abacus"] == "no wires"


def wrong(change):
    """The operator, with ``change`` made to its output and state."""
    original = wkv4.wkv4

    def operator(*args, **kwargs):
        return change(args, *original(*args, **kwargs))

    return operator


FAULTS = {
    "output": (lambda args, y, state: (y * 1.05, state), "reference"),
    "nan": (lambda args, y, state: (y * torch.nan, state), "reference"),
    "state": (lambda args, y, state: (y, torch.zeros_like(state)), "parts"),
    "shape": (lambda args, y, state: raiser(RuntimeError("broken"))(), "reference"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_doctor_finds_a_broken_operator(monkeypatch, fault):
    change, law = FAULTS[fault]
    monkeypatch.setattr(doctor.operator, "wkv4", wrong(change))
    result = rwkv("doctor")
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if "FAIL" in line]
    assert any(law in line for line in failed) and len(failed) < result.stdout.count("PASS") + len(failed)
    assert json.loads(rwkv("doctor", "--json").stdout)["passed"] is False


@pytest.mark.parametrize("value", [0.1, torch.nan])
def test_doctor_finds_a_model_that_reads_padding(monkeypatch, value):
    forward = modeling_rwkv.RwkvForCausalLM.forward

    def leaky(self, *args, attention_mask=None, **kwargs):
        output = forward(self, *args, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            output.logits[-1] += value
        return output

    monkeypatch.setattr(modeling_rwkv.RwkvForCausalLM, "forward", leaky)
    result = rwkv("doctor")
    assert result.exit_code == 1
    (failed,) = [line for line in result.stdout.splitlines() if "FAIL" in line]
    assert "padded" in failed


# -- help ------------------------------------------------------------------------------------------


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
