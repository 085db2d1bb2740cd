"""Laws of a state that sequences begin with: it is read text, wherever a sequence begins."""

import pytest
import torch
from models import agree, make, padded, same, text
from transformers import AutoModelForCausalLM

from modeling_rwkv import RwkvCache, RwkvConfig, RwkvForCausalLM, RwkvModel
from modeling_rwkv.checkpoints import CheckpointError, convert
from modeling_rwkv.initial_state import WEIGHTLESS, RwkvInitialState


@pytest.fixture
def read():
    """A model, a prefix, and the model that begins with having read it."""
    model, prefix = make("narrow attention"), text(1, 6, 77)
    tuned = make("narrow attention")
    with torch.no_grad():
        tuned.set_initial_state(model(prefix).past_key_values)
    return model, prefix, tuned


def test_a_sequence_continues_what_the_state_has_read(read):
    model, prefix, tuned = read
    ids = text(3, 9, 77)
    agree(tuned(ids).logits, model(torch.cat([prefix.expand(3, -1), ids], dim=1)).logits[:, 6:])


def test_so_does_every_row_and_every_packed_sequence(read):
    _, _, tuned = read
    rows = [text(1, n, 77)[0] for n in (1, 5, 8)]
    alone = [tuned(row[None]).logits[0] for row in rows]
    ids, mask = padded(rows)
    output = tuned(ids, attention_mask=mask)
    for i, expected in enumerate(alone):
        agree(output.logits[i][mask[i] == 1], expected)
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    agree(tuned(torch.cat(rows)[None], position_ids=positions).logits[0], torch.cat(alone))


def test_a_cache_comes_before_it_and_what_begins_after_the_cache_does_not(read):
    model, prefix, tuned = read
    first, second, third = (text(1, n, 77) for n in (4, 3, 5))
    cache = model(first, use_cache=True).past_key_values
    output = tuned(
        torch.cat([second, third], dim=1), position_ids=torch.tensor([[4, 5, 6, 0, 1, 2, 3, 4]]), past_key_values=cache
    )
    agree(output.logits[:, :3], model(torch.cat([first, second], dim=1)).logits[:, 4:])
    agree(output.logits[:, 3:], model(torch.cat([prefix, third], dim=1)).logits[:, 6:])


def test_a_row_of_padding_keeps_it(read):
    _, _, tuned = read
    ids, mask = text(2, 4, 77), torch.tensor([[1, 1, 1, 1], [0, 0, 0, 0]])
    cache = tuned(ids, attention_mask=mask).past_key_values
    cache.batch_select_indices(torch.tensor([1]))
    agree(tuned(ids[:1], past_key_values=cache).logits, tuned(ids[:1]).logits)


def test_generation_begins_with_it(read):
    model, prefix, tuned = read
    ids = text(1, 5, 77)
    whole = model.generate(torch.cat([prefix, ids], dim=1), max_new_tokens=6, do_sample=False)
    assert tuned.generate(ids, max_new_tokens=6, do_sample=False)[0].tolist() == whole[0, 6:].tolist()
    beams = tuned.generate(ids, max_new_tokens=4, num_beams=3, do_sample=False)
    expected = model.generate(torch.cat([prefix, ids], dim=1), max_new_tokens=4, num_beams=3, do_sample=False)
    assert beams[0].tolist() == expected[0, 6:].tolist()


def test_it_is_saved_and_loaded_with_the_model(read, tmp_path):
    _, _, tuned = read
    ids = text(1, 5, 77)
    tuned.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    same(loaded(ids).logits, tuned(ids).logits)
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in half.rwkv.initial_state.parameters()} == {torch.float32}
    assert half.generate(ids, max_new_tokens=2, min_new_tokens=2).shape == (1, 7)
    agree(RwkvModel.from_pretrained(tmp_path)(ids).last_hidden_state, tuned.rwkv(ids).last_hidden_state)


def test_it_is_a_file_of_its_own(read, tmp_path):
    model, _, tuned = read
    ids, path = text(2, 5, 77), tmp_path / "state.safetensors"
    tuned.rwkv.initial_state.cache().save(path)
    expected = tuned(ids).logits
    plain = make("narrow attention")
    for place in (path, tmp_path):
        plain.set_initial_state(place)
        agree(plain(ids).logits, expected)
    plain.set_initial_state(None)
    same(plain(ids).logits, model(ids).logits)
    cache = RwkvCache.load(path)
    cache.batch_repeat_interleave(2)
    assert cache.get_seq_length() == 0
    agree(plain(ids, past_key_values=cache).logits, expected)


def test_without_anything_read_it_is_empty():
    model, ids = make(), text(2, 5, 61)
    expected = model(ids).logits
    model.rwkv.initial_state = RwkvInitialState(model.config)
    model.rwkv.initial_state.set(None)
    same(model(ids).logits, expected)
    new = RwkvForCausalLM(RwkvConfig(vocab_size=5, hidden_size=4, num_hidden_layers=2, initial_state=True))
    assert {name: x.unique().tolist() for name, x in new.rwkv.initial_state.named_parameters()} == {
        "time_mix": [0], "channel_mix": [0], "value": [0], "weight": [WEIGHTLESS]
    }  # fmt: skip


def test_gradients_are_those_of_differences():
    model = make(dtype=torch.float64)
    model.set_initial_state(model(text(1, 4, 61)).past_key_values.detach())
    model.double()
    ids = text(2, 7, 61)
    parameters = list(model.rwkv.initial_state.parameters())
    generator = torch.Generator().manual_seed(3)
    directions = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    grads = torch.autograd.grad(model(ids).logits.square().mean(), parameters)
    slope = sum((g * d).sum() for g, d in zip(grads, directions, strict=True))
    assert all(g.abs().max() > 0 for g in grads)
    sides = []
    with torch.no_grad():
        for step in (1e-6, -2e-6):
            for p, d in zip(parameters, directions, strict=True):
                p += step * d
            sides.append(model(ids).logits.square().mean())
    agree(slope, (sides[0] - sides[1]) / 2e-6)


def test_a_pth_file_cannot_hold_it(read, tmp_path):
    _, _, tuned = read
    tuned.save_pretrained(tmp_path / "model")
    with pytest.raises(CheckpointError, match="begins with a state"):
        convert(tmp_path / "model", tmp_path / "model.pth")


def test_it_goes_where_its_model_goes(read, tmp_path):
    """Weights on the disk are fetched for the modules that are called."""
    _, _, tuned = read
    ids = text(1, 5, 77)
    tuned.save_pretrained(tmp_path / "model")
    offloaded = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map={"": "disk"}, offload_folder=tmp_path / "disk"
    )
    agree(offloaded(ids).logits, tuned(ids).logits)


def test_it_is_trained_where_the_embeddings_are():
    model = make()
    cache = model(text(1, 3, 61)).past_key_values.detach()
    for frozen in (True, False):
        model.requires_grad_(not frozen)
        with torch.inference_mode():
            model.set_initial_state(cache)
        assert all(p.requires_grad != frozen and not p.is_inference() for p in model.rwkv.initial_state.parameters())


def test_a_state_that_does_not_fit_is_refused(tmp_path):
    model = make()
    with pytest.raises(ValueError, match="the state has 2 rows"):
        model.set_initial_state(model(text(2, 3, 61)).past_key_values)
    with pytest.raises(ValueError, match="the state is empty"):
        model.set_initial_state(RwkvCache())
    other, path = make("one layer"), tmp_path / "other.safetensors"
    other(text(1, 3, 31), use_cache=True).past_key_values.save(path)
    with pytest.raises(ValueError, match=f"the state in {path} comes from another model"):
        model.set_initial_state(path)
    with pytest.raises(FileNotFoundError):
        model.set_initial_state(tmp_path / "none.safetensors")
    assert model.rwkv.initial_state is None and not model.config.initial_state
