"""Laws of checkpoint conversion: bit-exact both ways, and read alike by every implementation."""

import gc
import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from checkpoint_cases import (
    DTYPES,
    SHAPES,
    SMALL,
    TEXT,
    Shape,
    assert_same,
    bits,
    blink_state,
    load,
    make_tokenizer,
    save,
)
from tokenizers import Tokenizer, models
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.models.rwkv.modeling_rwkv import RwkvForCausalLM as BuiltinRwkv

from modeling_rwkv import RwkvConfig, RwkvForCausalLM, checkpoint_files, checkpoints
from modeling_rwkv.checkpoints import convert, folder_to_pth, pth_to_folder


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_round_trip_is_bit_exact(tmp_path: Path, shape: Shape, dtype: torch.dtype) -> None:
    state = blink_state(shape, dtype)
    state["emb.weight"][0, 0] = float("nan")
    state["emb.weight"][1, 0] = -0.0
    save(tmp_path / "a.pth", state)
    report = convert(tmp_path / "a.pth", tmp_path / "out", progress=False)
    back = convert(tmp_path / "out", tmp_path / "b.pth", progress=False)
    assert_same(load(tmp_path / "b.pth"), state)
    assert list(load(tmp_path / "b.pth")) == list(state)
    assert report.tensors == back.tensors == len(state)
    assert report.parameters == back.parameters == sum(t.numel() for t in state.values())
    assert report.nbytes == back.nbytes == sum(t.nbytes for t in state.values())
    assert report.sizes == back.sizes


def test_mixed_types_survive(tmp_path: Path) -> None:
    state = blink_state(dtype=torch.bfloat16)
    for name in state:
        if name.endswith(("time_decay", "time_first")):
            state[name] = state[name].float() + 1e-5
    report = convert(save(tmp_path / "a.pth", state), tmp_path / "out", progress=False)
    convert(tmp_path / "out", tmp_path / "b.pth", progress=False)
    assert_same(load(tmp_path / "b.pth"), state)
    assert report.dtypes == ("bfloat16", "float32")
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_config_follows_the_tensors(tmp_path: Path, shape: Shape) -> None:
    source = save(tmp_path / "a.pth", blink_state(shape))
    pth_to_folder(source, tmp_path / "out", context_length=4096, progress=False)
    config = RwkvConfig.from_pretrained(tmp_path / "out")
    assert shape == Shape(
        config.vocab_size,
        config.hidden_size,
        config.attention_hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
    )
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["architectures"] == ["RwkvForCausalLM"]
    assert written["model_type"] == "rwkv"
    assert written["context_length"] == 4096
    assert written["tie_word_embeddings"] is False
    assert (written["bos_token_id"], written["eos_token_id"]) == (0, 0)


@pytest.mark.parametrize("max_shard_size", ["5GB", 300])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_every_implementation_reads_the_same_model(tmp_path: Path, shape: Shape, max_shard_size: int | str) -> None:
    """The official package reads the .pth; transformers' model and ours read the folder."""
    from rwkv.model import RWKV  # reads the environment, so not before conftest has set it

    source = save(tmp_path / "a.pth", blink_state(shape))
    convert(source, tmp_path / "out", max_shard_size=max_shard_size, progress=False)
    ids = torch.randint(shape.vocab, (9,), generator=torch.Generator().manual_seed(1))
    official, state = RWKV(str(source.with_suffix("")), "cpu fp32", verbose=False), None
    expected = []
    for token in ids.tolist():
        logits, state = official.forward([token], state)
        expected.append(logits)
    # The built-in model cannot be made with one layer: its initialisation divides by zero.
    builtin = [BuiltinRwkv] if shape.layers > 1 else []
    for model_class in (RwkvForCausalLM, AutoModelForCausalLM, *builtin):
        model, info = model_class.from_pretrained(tmp_path / "out", output_loading_info=True)
        assert not any(info.values()), info
        with torch.no_grad():
            logits = model.eval()(ids[None], use_cache=False).logits[0]
        torch.testing.assert_close(logits, torch.stack(expected), rtol=0, atol=1e-4)


def test_our_own_save_pretrained_converts_back(tmp_path: Path) -> None:
    state = blink_state()
    convert(save(tmp_path / "a.pth", state), tmp_path / "out", progress=False)
    RwkvForCausalLM.from_pretrained(tmp_path / "out").save_pretrained(tmp_path / "again")
    convert(tmp_path / "again", tmp_path / "b.pth", progress=False)
    assert_same(load(tmp_path / "b.pth"), state)


def test_shards_keep_to_the_limit_and_are_indexed(tmp_path: Path) -> None:
    limit = 400
    source = save(tmp_path / "a.pth")
    report = convert(source, tmp_path / "out", max_shard_size=limit, progress=False)
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    names = [file.name for file in report.files]
    assert len(names) > 2
    assert names == [f"model-{n:05}-of-{len(names):05}.safetensors" for n in range(1, len(names) + 1)]
    assert index["metadata"]["total_size"] == report.nbytes
    assert set(index["weight_map"].values()) == set(names)
    for file in report.files:
        held = checkpoint_files.load_safetensors_file(file)
        assert {index["weight_map"][name] for name in held} == {file.name}
        assert len(held) == 1 or sum(t.nbytes for t in held.values()) <= limit


@pytest.mark.parametrize("vocab", [3, 13, 113, 1113])
def test_tensors_in_safetensors_are_aligned(tmp_path: Path, vocab: int) -> None:
    state = blink_state(Shape(vocab, 5, 2, 7, 1), torch.bfloat16)
    state["head.weight"] = state["head.weight"].double()
    convert(save(tmp_path / "a.pth", state), tmp_path / "out", progress=False)
    raw = (tmp_path / "out/model.safetensors").read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    assert header.pop("__metadata__") == {"format": "pt"}
    assert length % 8 == 0
    for entry in header.values():
        width = {"F64": 8, "BF16": 2}[entry["dtype"]]
        assert entry["data_offsets"][0] % width == 0


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_views_and_shared_storage_do_not_matter(tmp_path: Path, legacy: bool) -> None:
    state = blink_state()
    expected = {name: tensor.clone() for name, tensor in state.items()}
    expected["head.weight"] = expected["emb.weight"].clone()
    state["head.weight"] = state["emb.weight"]
    whole = torch.cat([state[f"ln_out.{part}"] for part in ("weight", "bias")])
    state["ln_out.weight"], state["ln_out.bias"] = whole.chunk(2)
    state["blocks.0.ffn.key.weight"] = expected["blocks.0.ffn.key.weight"].t().contiguous().t()
    save(tmp_path / "a.pth", state, _use_new_zipfile_serialization=not legacy)
    convert(tmp_path / "a.pth", tmp_path / "out", progress=False)
    assert convert(tmp_path / "out", tmp_path / "b.pth", progress=False).tensors == len(state)
    assert_same(load(tmp_path / "b.pth"), expected)


@pytest.mark.parametrize("sharded", [False, True])
def test_folder_of_pickled_weights(tmp_path: Path, sharded: bool) -> None:
    state = blink_state()
    out = tmp_path / "out"
    convert(save(tmp_path / "a.pth", state), out, progress=False)
    tensors = checkpoint_files.load_model_folder(out)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    (out / "model.safetensors").unlink()
    if sharded:
        names = list(tensors)
        parts = {"p-1.bin": names[:9], "p-2.bin": names[9:]}
        for file, part in parts.items():
            torch.save({name: tensors[name] for name in part}, out / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        index = {"metadata": {}, "weight_map": weight_map}
        (out / "pytorch_model.bin.index.json").write_text(json.dumps(index))
    else:
        torch.save(tensors, out / "pytorch_model.bin")
    folder_to_pth(out, tmp_path / "b.pth", progress=False)
    assert_same(load(tmp_path / "b.pth"), state)


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_tied_model_gets_a_head_of_its_own(tmp_path: Path, weights: str) -> None:
    config = RwkvConfig(vocab_size=9, hidden_size=4, num_hidden_layers=2, tie_word_embeddings=True)
    model = RwkvForCausalLM(config)
    model.save_pretrained(tmp_path / "tied")
    if weights == "pytorch_model.bin":
        (tmp_path / "tied/model.safetensors").unlink()
        torch.save(model.state_dict(), tmp_path / "tied" / weights)
    folder_to_pth(tmp_path / "tied", tmp_path / "a.pth", progress=False)
    state = load(tmp_path / "a.pth")
    assert bits(state["head.weight"]) == bits(model.rwkv.embeddings.weight)
    state["head.weight"] += 1
    assert bits(state["emb.weight"]) == bits(model.rwkv.embeddings.weight)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_cast(tmp_path: Path, dtype: str) -> None:
    state = blink_state()
    source = save(tmp_path / "a.pth", state)
    expected = {name: tensor.to(getattr(torch, dtype)) for name, tensor in state.items()}
    report = convert(source, tmp_path / "cast", dtype=dtype, progress=False)
    convert(tmp_path / "cast", tmp_path / "b.pth", progress=False)
    assert report.dtypes == (dtype,)
    assert json.loads((tmp_path / "cast/config.json").read_text())["dtype"] == dtype
    convert(source, tmp_path / "plain", progress=False)
    convert(tmp_path / "plain", tmp_path / "c.pth", dtype=dtype, progress=False)
    for file in ("b.pth", "c.pth"):
        assert_same(load(tmp_path / file), expected)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_memory_stays_far_below_the_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    peak = 0

    class Watch(SimpleNamespace):
        """A progress bar that watches the process's own memory (mapped files are not in it)."""

        def update(self, nbytes: int) -> None:
            nonlocal peak
            peak = max(peak, own_memory())

        def __enter__(self) -> "Watch":
            return self

        def __exit__(self, *error: object) -> None: ...

    save(tmp_path / "a.pth", blink_state(Shape(256, 512, 512, 2048, 12), torch.bfloat16))
    monkeypatch.setattr(checkpoints, "tqdm", lambda **kwargs: Watch(**kwargs))
    gc.collect()
    before = own_memory()
    report = convert(tmp_path / "a.pth", tmp_path / "out")
    convert(tmp_path / "out", tmp_path / "b.pth")
    convert(tmp_path / "a.pth", tmp_path / "wide", dtype="float32")
    convert(tmp_path / "wide", tmp_path / "c.pth", dtype="float16")
    assert report.nbytes > 70e6
    assert 0 < peak < before + report.nbytes / 2


def own_memory() -> int:
    found = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return 1024 * int(found[1])


# -- the tokenizer beside the weights --------------------------------------------------------------


@pytest.mark.parametrize("from_folder", [False, True])
def test_tokenizer_beside_the_weights(tmp_path: Path, from_folder: bool) -> None:
    tokenizer = make_tokenizer(270)
    (tmp_path / "tok").mkdir()
    path = tmp_path / "tok/tokenizer.json"
    tokenizer.save(str(path))
    if from_folder:
        settings = {"tokenizer_class": "GPTNeoXTokenizer", "model_max_length": 77}
        settings |= dict.fromkeys(("bos_token", "eos_token", "unk_token"), "<|endoftext|>")
        (tmp_path / "tok/tokenizer_config.json").write_text(json.dumps(settings))
        path = tmp_path / "tok"
    source = save(tmp_path / "a.pth", blink_state(SMALL._replace(vocab=277)))
    report = convert(source, tmp_path / "out", tokenizer=path, progress=False)
    assert report.tokenizer == tmp_path / "out/tokenizer.json"

    loaded = AutoTokenizer.from_pretrained(tmp_path / "out", local_files_only=True)
    assert loaded.is_fast
    assert (loaded.bos_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 0, 0)
    assert loaded.pad_token is None
    assert len(loaded) == tokenizer.get_vocab_size()
    assert loaded.model_max_length == (77 if from_folder else 1024)
    for text in [*TEXT, "<|endoftext|>naïve \u200b文 \n\n x ."]:
        assert loaded(text).input_ids == tokenizer.encode(text).ids
        assert loaded.decode(loaded(text).input_ids) == text


def test_tokenizer_without_end_of_document_gets_no_special_token(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    Tokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a")).save(str(path))
    convert(save(tmp_path / "a.pth"), tmp_path / "out", tokenizer=path, progress=False)
    assert AutoTokenizer.from_pretrained(tmp_path / "out").eos_token is None


def test_no_tokenizer_is_invented(tmp_path: Path) -> None:
    report = convert(save(tmp_path / "a.pth"), tmp_path / "out", progress=False)
    assert report.tokenizer is None
    assert not list((tmp_path / "out").glob("*token*"))
