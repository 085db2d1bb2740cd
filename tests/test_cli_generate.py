"""`rwkv generate`: what it prints and where."""

import json
import os
import re
import signal
import warnings

import models
import pytest
import torch
from commands import VOCAB_SIZE, copied_model, program, random_model, rwkv, write_on  # noqa: F401 - fixtures
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders
from tokenizers.models import BPE
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import modeling_rwkv
from modeling_rwkv import cli, generation
from modeling_rwkv.streaming import TextPieces
from rwkv_kernels.build_cache import KernelWarning


def test_greedy_is_generate(folder):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    inputs = tokenizer("Once", return_tensors="pt")
    output = model.generate(**inputs, do_sample=False, max_new_tokens=40)
    expected = tokenizer.decode(output[0], skip_special_tokens=True)
    result = write_on(folder, "--temperature", 0, tokens=40)
    assert result.stdout == expected + "\n"
    said = r"40 tokens after a prompt of 4 in (\d+\.\d\d) s: the first in (\d+\.\d\d) s, then (\d+\.\d) tokens/s\n"
    seconds, first, speed = map(float, re.fullmatch(said, result.stderr).groups())
    assert first <= seconds and speed > 0
    one = write_on(folder, "--temperature", 0, tokens=1).stderr
    assert re.fullmatch(r"1 token after a prompt of 4 in \S+ s\n", one)


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
    rest = found["seconds"] - found["first_token_seconds"]
    assert rest > 0 and found["tokens_per_second"] == pytest.approx(19 / rest, rel=0.05)
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
            assert set(seen) == {expected} and torch.get_num_threads() == 2
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
        streamer = TextPieces(tokenizer, pieces.append)
        streamer.put(torch.tensor([tokens[:1]]))
        for token in tokens[1:]:
            streamer.put(torch.tensor([token]))
        streamer.end()
        assert tokenizer.decode(tokens[:1]) + "".join(pieces) == tokenizer.decode(tokens)
        if whole:
            assert pieces == list(text[1:])  # each as soon as its last byte is there


@pytest.mark.parametrize("cut", range(3, 14))
def test_a_character_that_the_prompt_leaves_unfinished_is_shown_when_it_is_whole(folder, cut):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = "\ufffdaé從🙂b"
    ids = tokenizer(text)["input_ids"]
    pieces = []
    streamer = TextPieces(tokenizer, pieces.append)
    streamer.put(torch.tensor([ids[:cut]]))
    for token in ids[cut:]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    whole = bytes(text, "utf-8")[:cut].decode(errors="ignore")
    assert "".join(pieces) == text[len(whole) :]


def test_pieces_keep_the_spaces_between_them():
    """Of tokenizers that leave out the space at the beginning of what they decode."""
    words = {"▁once": 0, "▁upon": 1, "▁a": 2, "▁time": 3}
    tokenizer = Tokenizer(BPE(vocab=words, merges=[]))
    tokenizer.decoder = decoders.Metaspace()
    pieces = []
    streamer = TextPieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer), pieces.append)
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
