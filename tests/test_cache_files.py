"""States in files: whole or not at all, bit for bit, and only for the model that they are of."""

import resource
from contextlib import contextmanager

import pytest
import torch
from models import make, same, text
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from modeling_rwkv import RwkvCache
from modeling_rwkv.cache import LayerState, saved_notes


def flat(cache):
    return [part for layer in cache.layers for part in layer]


def read(model, ids):
    with torch.no_grad():
        return model(ids).past_key_values


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_a_saved_cache_comes_back_bit_for_bit(dtype, tmp_path):
    model = make("wide attention", dtype=dtype)
    ids = text(3, 6, 53)
    cache = read(model, ids)
    cache.save(tmp_path / "prompt.safetensors")
    loaded = RwkvCache.load(tmp_path / "prompt.safetensors")
    same(flat(loaded), flat(cache))
    assert repr(loaded) == repr(cache) and loaded.has_read(ids)
    more = text(3, 4, 53)
    same(model(more, past_key_values=loaded).logits, model(more, past_key_values=cache).logits)
    assert [x.name for x in tmp_path.iterdir()] == ["prompt.safetensors"]


def test_a_saved_cache_may_have_a_graph_or_shared_rows_behind_it(tmp_path):
    model = make()
    cache = model(text(1, 6)).past_key_values
    cache.batch_repeat_interleave(3)
    cache.layers = [LayerState(*(part.expand_as(part) for part in layer)) for layer in cache.layers]
    cache.save(tmp_path / "state")
    loaded = RwkvCache.load(tmp_path / "state")
    same(flat(loaded), [part.detach() for part in flat(cache)])
    assert not any(part.requires_grad for part in flat(loaded))


@contextmanager
def full_disk():
    """Files may hold 100 bytes."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_file_is_written_whole_or_not_at_all(tmp_path):
    path = tmp_path / "state"
    cache = read(make(), text(1, 6))
    cache.save(path)
    before = path.read_bytes()
    longer = read(make(), text(2, 9))
    with full_disk(), pytest.raises(OSError, match="too large") as caught:
        longer.save(path)
    assert caught.value.filename == str(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("name", [".", "..", "folder", "no/where", "state/x", "x" * 300])
def test_where_no_file_can_be_the_error_has_its_name(tmp_path, name):
    (tmp_path / "folder" / "full").mkdir(parents=True)
    cache = read(make(), text(1, 6))
    cache.save(tmp_path / "state")
    with pytest.raises(OSError, match=str(tmp_path)) as caught:
        cache.save(f"{tmp_path}/{name}")
    assert caught.value.filename == str(tmp_path / name) and not caught.value.filename2
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["folder", "full", "state"]
    cache.save(tmp_path / ("x" * 255))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, "int8"])
def test_a_saved_cache_is_loaded_with_its_model_in_any_dtype(dtype, tmp_path):
    model = make(seed=1)
    model.save_pretrained(tmp_path)
    read(model, text(1, 6)).save(tmp_path / "state", model)
    if dtype == "int8":
        for module in model.modules():  # as quantizers do: vectors stay
            if isinstance(module, torch.nn.Linear):
                module.weight = torch.nn.Parameter(module.weight.to(torch.int8), requires_grad=False)
    else:
        model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    assert RwkvCache.load(tmp_path / "state", model=model).seen_tokens == 6


def test_a_saved_cache_is_refused_with_another_model(tmp_path):
    """By sizes always, by weights where the model was known, and before it is used."""
    model = make(seed=1)
    read(model, text(1, 6)).save(tmp_path / "known", model)
    read(model, text(1, 6)).save(tmp_path / "unknown")
    for name in ("known", "unknown"):
        for change in ({"num_hidden_layers": 2}, {"hidden_size": 16}, {"attention_hidden_size": 16}):
            with pytest.raises(ValueError, match=f"{name} comes from another model: its layers"):
                RwkvCache.load(tmp_path / name, model=make(**change))
    assert RwkvCache.load(tmp_path / "unknown", model=make(seed=2)).seen_tokens == 6
    with pytest.raises(ValueError, match="known comes from another model of these sizes"):
        RwkvCache.load(tmp_path / "known", model=make(seed=2))
    with pytest.raises(ValueError, match="known comes from another model of these sizes"):
        make(seed=2).set_initial_state(tmp_path / "known")
    assert RwkvCache.load(tmp_path / "known", model=make(seed=2).to("meta")).seen_tokens == 6
    trained = make(seed=1)
    for name, x in trained.named_parameters():
        x.data.mul_(1 + 1e-2 * name.endswith("time_first"))
    with pytest.raises(ValueError, match="known comes from another model of these sizes"):
        RwkvCache.load(tmp_path / "known", model=trained)
    with pytest.raises(ValueError, match="another model"):
        read(model, text(1, 6)).save(tmp_path / "known", make(hidden_size=16))


def test_notes_are_kept_with_a_cache(tmp_path):
    cache, notes = read(make(), text(1, 6)), {"format": "mine", "a tale": '{"狐狸": [1, "\n"]}', "": ""}
    cache.save(tmp_path / "state", notes=notes)
    assert saved_notes(tmp_path / "state") == notes
    same(flat(RwkvCache.load(tmp_path / "state")), flat(cache))
    cache.save(tmp_path / "state")
    assert saved_notes(tmp_path / "state") == {}


def test_an_empty_cache_is_not_saved(tmp_path):
    with pytest.raises(ValueError, match="empty"):
        RwkvCache().save(tmp_path / "state")
    assert not list(tmp_path.iterdir())


def damage(path, kind):
    cache = read(make(), text(1, 6))
    cache.save(path)
    data = path.read_bytes()
    if kind == "truncated":
        path.write_bytes(data[:-10])
    elif kind == "cut in the header":
        path.write_bytes(data[:100])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "text":
        path.write_text("Once upon a time")
    elif kind == "a model":
        save_file({"weight": torch.zeros(3)}, path)
    elif kind == "without a layer":
        metadata = {"format": "rwkv-4-cache", "seen_tokens": "6", "num_layers": "3"}
        save_file({"layers.0.wkv": torch.zeros(1, 3, 2)}, path, metadata=metadata)
    elif kind == "without its numbers":
        save_file({"layers.0.wkv": torch.zeros(1, 3, 2)}, path, metadata={"format": "rwkv-4-cache"})


@pytest.mark.parametrize(
    "kind",
    ["truncated", "cut in the header", "empty", "text", "a model", "without a layer", "without its numbers"],
)
def test_another_or_a_damaged_file_is_refused(kind, tmp_path):
    damage(tmp_path / "state", kind)
    with pytest.raises(ValueError, match="saved RwkvCache"):
        RwkvCache.load(tmp_path / "state")
    if kind not in ("truncated", "without a layer", "without its numbers"):  # whose header is whole
        with pytest.raises(ValueError, match="saved RwkvCache"):
            saved_notes(tmp_path / "state")


MISFITS = {  # tensors and metadata of a file, changed
    "no layers": lambda tensors, metadata: metadata.update(num_layers="0"),
    "two rows in a layer": lambda tensors, metadata: twice(tensors, "layers.1.wkv"),
    "two rows in a part": lambda tensors, metadata: [twice(tensors, f"layers.{i}.time_mix") for i in range(3)],
    "other channels": lambda tensors, metadata: twice(tensors, "layers.2.channel_mix", dim=1),
    "four rows of WKV": lambda tensors, metadata: [twice(tensors, f"layers.{i}.wkv", dim=1) for i in range(3)],
    "numbers alone": lambda tensors, metadata: tensors.update({name: torch.tensor(1.0) for name in tensors}),
}


def twice(tensors, name, dim=0):
    tensors[name] = torch.cat([tensors[name]] * 2, dim=dim)


@pytest.mark.parametrize("kind", MISFITS)
def test_a_file_whose_tensors_do_not_fit_together_is_refused(kind, tmp_path):
    path = tmp_path / "state"
    read(make(), text(1, 6)).save(path)
    with safe_open(path, framework="pt") as file:
        tensors, metadata = {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118
    MISFITS[kind](tensors, metadata)
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(ValueError, match="damaged"):
        RwkvCache.load(path)


def test_a_file_that_is_not_there_is_named(tmp_path):
    for path in (tmp_path / "nothing", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            RwkvCache.load(path)
