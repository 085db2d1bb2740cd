"""The recurrent state: it continues a text as if it had been read at once, with gradients, and survives a file."""

import copy
import pickle

import pytest
import torch
from models import SHAPES, agree, contents, gradients, make, same, text

from modeling_rwkv import RwkvCache
from modeling_rwkv.cache import LayerState

every_shape = pytest.mark.parametrize("shape", SHAPES)


def flat(cache):
    return [part for layer in cache.layers for part in layer]


def read(model, ids, past=None):
    """A cache after ids, and no autograd graph behind it."""
    with torch.no_grad():
        return model(ids, past_key_values=past).past_key_values


# Continuing


@every_shape
@torch.no_grad()
def test_a_text_may_be_split_anywhere(shape):
    model = make(shape)
    ids = text(2, 9, model.config.vocab_size)
    whole = model(ids)
    for split in range(1, 9):
        first = model(ids[:, :split])
        second = model(ids[:, split:], past_key_values=first.past_key_values)
        agree(torch.cat([first.logits, second.logits], dim=1), whole.logits)
        agree(contents(second.past_key_values), contents(whole.past_key_values))
        assert second.past_key_values.get_seq_length() == 9


@every_shape
@torch.no_grad()
def test_a_text_may_be_read_token_by_token(shape):
    model = make(shape)
    ids = text(2, 40, model.config.vocab_size)
    whole = model(ids).logits
    cache = RwkvCache()
    for t in range(40):
        logits = model(ids[:, t : t + 1], past_key_values=cache).logits
        agree(logits[:, 0], whole[:, t])


def test_without_gradients_the_given_cache_is_updated():
    model = make()
    ids = text(2, 9)
    cache = read(model, ids[:, :4])
    with torch.no_grad():
        output = model(ids[:, 4:], past_key_values=cache)
    assert output.past_key_values is cache and cache.get_seq_length() == 9
    agree(contents(cache), contents(read(model, ids)))


def test_with_gradients_the_given_cache_is_left_alone():
    model = make()
    ids = text(2, 9)
    cache = read(model, ids[:, :4])
    before = copy.deepcopy(cache)
    output = model(ids[:, 4:], past_key_values=cache)
    assert output.past_key_values is not cache
    assert cache.get_seq_length() == 4 and output.past_key_values.get_seq_length() == 9
    same(flat(cache), flat(before))
    agree(contents(output.past_key_values), contents(read(model, ids)))


def test_in_training_a_cache_is_returned_only_where_it_is_asked_for():
    model = make().train()
    cache = read(model.eval(), text(1, 4))
    before = copy.deepcopy(cache)
    with torch.no_grad():
        assert model.train()(text(1, 5), past_key_values=cache).past_key_values is None
        same(flat(cache), flat(before))
        assert model(text(1, 5), use_cache=True).past_key_values.get_seq_length() == 5
        assert model.eval()(text(1, 5)).past_key_values.get_seq_length() == 5
        assert model(text(1, 5), use_cache=False).past_key_values is None


@pytest.mark.parametrize("shape", ["one layer", "wide attention"])
def test_gradients_through_the_state_are_those_of_the_whole(shape):
    model = make(shape)
    ids = text(2, 12, model.config.vocab_size)
    (model(ids).logits.square().sum()).backward()
    whole = gradients(model)
    past, loss = None, 0.0
    for chunk in ids.split([5, 1, 4, 2], dim=1):
        output = model(chunk, past_key_values=past)
        past, loss = output.past_key_values, loss + output.logits.square().sum()
    loss.backward()
    agree(gradients(model), whole, rtol=1e-3, atol=1e-3)


def test_detach_truncates_backpropagation_through_time():
    model = make()
    ids = text(1, 8)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    past = model(inputs_embeds=embeds[:, :5]).past_key_values
    for cache, reaches in ((past, True), (past.clone(), True), (past.detach(), False)):
        embeds.grad = None
        loss = model(inputs_embeds=embeds[:, 5:], past_key_values=cache).logits.sum()
        loss.backward(retain_graph=True)
        assert bool(embeds.grad[:, :5].any()) is reaches
    assert any(part.requires_grad for part in flat(past))


def test_an_initial_state_can_be_learnt():
    """Gradients reach a state that the user made of leaves, and one step along them lowers the loss."""
    model = make().requires_grad_(False)
    ids = text(2, 7)
    cache = read(model, text(2, 3))
    leaves = [part.clone().requires_grad_() for part in flat(cache)]
    cache.layers = [LayerState(*leaves[i : i + 3]) for i in range(0, len(leaves), 3)]
    loss = model(ids, labels=ids, past_key_values=cache).loss
    grads = torch.autograd.grad(loss, leaves)
    assert all(grad.any() for grad in grads)
    with torch.no_grad():
        for leaf, grad in zip(leaves, grads, strict=True):
            leaf -= 1e-3 * grad
        assert model(ids, labels=ids, past_key_values=cache).loss < loss


@torch.no_grad()
def test_a_state_of_zeros_is_empty():
    """transformers resets caches by filling them with zeros."""
    model = make()
    ids = text(2, 6)
    cache = read(model, ids)
    for part in flat(cache):
        part.zero_()
    same(model(ids, past_key_values=cache).logits, model(ids).logits)


# What can be done with a cache


@pytest.mark.parametrize("in_one_piece", [False, True])
def test_rows_can_be_taken_repeated_and_reordered(in_one_piece):
    model, ids = make(), text(3, 6)
    cache = read(model, ids)
    if in_one_piece:
        cache.stack = cache.stack
    parts = flat(cache.clone())
    for change, argument, order in [
        ("reorder_cache", torch.tensor([2, 0, 0]), [2, 0, 0]),
        ("batch_select_indices", torch.tensor([1]), [1]),
        ("batch_select_indices", torch.tensor([True, False, True]), [0, 2]),
        ("batch_repeat_interleave", 2, [0, 0, 1, 1, 2, 2]),
    ]:
        changed = cache.clone()
        getattr(changed, change)(argument)
        assert changed.batch_size == len(order) and changed.get_seq_length() == 6
        assert changed.has_read(ids[order])
        same(flat(changed), [part[order] for part in parts])
    assert cache.batch_size == 3
    with pytest.raises(IndexError):
        cache.batch_select_indices(torch.tensor([True, False]))


@pytest.mark.parametrize("indices", [torch.tensor([0, 0]), torch.tensor([True])])
def test_rows_of_an_empty_cache_are_none(indices):
    cache = RwkvCache()
    cache.batch_select_indices(indices)
    cache.batch_repeat_interleave(2)
    assert not cache.is_initialized


COPIES = {
    "clone": RwkvCache.clone,
    "detach and clone": lambda cache: cache.detach().clone(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda cache: pickle.loads(pickle.dumps(cache)),
}


@pytest.mark.parametrize("how", COPIES)
@torch.no_grad()
def test_a_copy_is_independent(how):
    model = make()
    cache = read(model, text(2, 6))
    twin = COPIES[how](cache)
    same(flat(twin), flat(cache))
    before = copy.deepcopy(cache)
    more = text(2, 3)
    logits = model(more, past_key_values=twin).logits
    for part in flat(twin):
        part.fill_(7.0)
    same(flat(cache), flat(before))
    assert cache.get_seq_length() == 6 and cache.has_read(text(2, 6)) and twin.get_seq_length() == 9
    same(model(more, past_key_values=cache).logits, logits)


def test_reset_forgets_everything():
    model = make()
    cache = read(model, text(2, 6))
    cache.reset()
    assert cache.get_seq_length() == 0 and not cache.is_initialized and cache.batch_size == -1
    ids = text(3, 4)  # even how many rows there were
    with torch.no_grad():
        same(model(ids, past_key_values=cache).logits, model(ids).logits)


def test_to_moves_everything_and_casts_what_follows_the_model():
    cache = read(make(), text(2, 6))
    moved = cache.to("meta")
    assert {part.device.type for part in flat(moved)} == {"meta"} and {x.device.type for x in flat(cache)} == {"cpu"}
    cast = cache.to(dtype=torch.bfloat16)
    assert {layer.wkv.dtype for layer in cast.layers} == {torch.float32}
    assert {x.dtype for layer in cast.layers for x in layer[:2]} == {torch.bfloat16}
    assert {x.dtype for x in flat(cache)} == {torch.float32}
    same(flat(cache.to("cpu")), flat(cache))


@torch.no_grad()
@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
def test_a_cache_may_come_from_the_same_model_in_another_dtype(other):
    first, second = make(), make(dtype=other)
    ids, more = text(2, 6), text(2, 3)
    expected = first(more, past_key_values=read(first, ids)).logits
    for model, past in ((second, first), (first, second)):
        for cache in (read(past, ids), read(past, ids).to(dtype=model.dtype)):
            logits = model(more, past_key_values=cache).logits
            assert (logits - expected).abs().mean() < (0.1 if other == torch.bfloat16 else 1e-5)


def test_what_an_rnn_cannot_do_is_refused_with_a_cure():
    cache = read(make(), text(2, 6))
    with pytest.raises(NotImplementedError, match=r"clone\(\)"):
        cache.crop(3)
    with pytest.raises(TypeError, match="past_key_values"):
        cache.update(torch.zeros(1), torch.zeros(1), 0)


def test_a_cache_tells_about_itself():
    cache = RwkvCache()
    assert repr(cache) == "RwkvCache(layers=0, batch_size=-1, seen_tokens=0)"
    assert not cache.is_initialized and cache.get_seq_length() == 0 and not cache.has_previous_state()
    cache = read(make(), text(2, 6), cache)
    assert repr(cache) == "RwkvCache(layers=3, batch_size=2, seen_tokens=6)"
    assert cache.is_initialized and cache.has_previous_state() and cache.get_max_length() == -1


def test_a_cache_knows_what_it_has_read():
    model = make()
    ids = text(2, 8)
    cache = read(model, ids[:, 5:], read(model, ids[:, :5]))
    assert cache.has_read(ids)
    for other in (ids.flip(1), ids.flip(0), (ids + 1) % 61, ids[:, :7], ids[:1], torch.zeros_like(ids)):
        assert not cache.has_read(other)
    half = ids.clone()
    half[1, 3] += 1
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        cache.has_read(half)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    with torch.no_grad():
        cache = model(ids, attention_mask=mask).past_key_values
    other = ids.clone()
    other[0, :3] = 0
    assert cache.has_read(other, mask != 0) and not cache.has_read(ids[:, 1:])
    holes = mask.clone()
    holes[0, 5] = holes[1, 2] = holes[1, 7] = 0  # padding only in the eyes of who guessed this mask
    assert cache.has_read(other, holes != 0)
    other[1, 2] += 1
    with pytest.raises(ValueError, match=r"rows \[1\]"):
        cache.has_read(other, holes != 0)


# What a model refuses


@pytest.mark.parametrize("change", [{"num_hidden_layers": 2}, {"hidden_size": 16}, {"attention_hidden_size": 16}])
def test_the_cache_of_another_model_is_refused(change):
    cache = read(make(**change), text(2, 6))
    with pytest.raises(ValueError, match="another model"):
        make()(text(2, 1), past_key_values=cache)


@pytest.mark.parametrize("rows", [1, 3])
def test_a_cache_of_another_batch_is_refused(rows):
    cache = read(make(), text(2, 6))
    with pytest.raises(ValueError, match=f"2 rows but the batch has {rows}"):
        make()(text(rows, 1), past_key_values=cache)


def test_what_is_not_an_rwkv_cache_is_refused():
    from transformers import DynamicCache

    for other in (DynamicCache(), ((torch.zeros(1),),)):
        with pytest.raises(ValueError, match="RwkvCache"):
            make()(text(1, 4), past_key_values=other)
    with pytest.raises(ValueError, match="past_key_values"):
        make()(text(1, 4), state=[torch.zeros(1)])


@pytest.mark.parametrize("masked", [False, True])
def test_a_cache_holds_nothing_but_the_state(masked):
    """A view of the last token would keep the activations of the whole text alive."""
    ids = text(2, 50)
    mask = torch.ones_like(ids)
    mask[0, :9] = 1 - int(masked)
    with torch.no_grad():
        cache = make()(ids, attention_mask=mask).past_key_values
    for tensor in (tensor for layer in cache.layers for tensor in layer):
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
