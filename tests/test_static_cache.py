"""Laws about a state that is written over, and about the graphs that compute its next token. Nothing is captured."""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from cuda_on_cpu import decoding_emulated
from models import PLAIN, contents, make, read, same, text
from torch import nn

from modeling_rwkv import RwkvStaticCache, decoding


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("decoding")


@pytest.fixture
def launches(folder):
    with decoding_emulated(folder, processors=2) as names:
        yield names


def test_a_static_cache_is_not_made_where_a_cache_is_given():
    model, ids = make(PLAIN), text(1, 4)
    with torch.no_grad():
        past = model(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cache_implementation"):
        model.generate(text(1, 5), past_key_values=past, cache_implementation="static", max_new_tokens=2)
    static = RwkvStaticCache()
    result = model.generate(ids, past_key_values=static, max_new_tokens=3, return_dict_in_generate=True)
    assert result.past_key_values is static and static.seen_tokens == 6


def test_a_static_cache_does_not_keep_its_model(launches):
    model = make(PLAIN)
    _, cache = read(model, text(1, 5), cache=RwkvStaticCache())
    gone = weakref.ref(model)
    del model
    gc.collect()
    assert gone() is None and cache.seen_tokens == 5


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
def test_copies_of_a_static_cache_go_on_by_themselves(copied, launches):
    model, ids = make(PLAIN), text(2, 5)
    _, cache = read(model, ids, cache=RwkvStaticCache())
    other = copied(cache)
    same(contents(other), contents(cache))
    numbers = sum(x.nbytes for layer in cache.layers for x in layer)
    assert len(pickle.dumps(other)) < numbers + 5000
    with torch.no_grad():
        expected = model(ids[:, :1], past_key_values=cache, use_cache=True).logits
        same(model(ids[:, :1], past_key_values=other, use_cache=True).logits, expected)
    same(contents(other), contents(cache))


@pytest.mark.parametrize("keep", [RwkvStaticCache.clone, RwkvStaticCache.detach, lambda cache: cache.to("cpu")])
def test_what_is_kept_of_a_static_cache_is_not_written_over(keep, launches):
    model, ids = make(PLAIN), text(2, 5)
    _, cache = read(model, ids, cache=RwkvStaticCache())
    kept = keep(cache)
    before = copy.deepcopy(contents(kept))
    with torch.no_grad():
        for token in ids.T:
            model(token[:, None], past_key_values=cache, use_cache=True)
    same(contents(kept), before)


def test_generate_sees_what_changed_since_it_was_given_a_static_cache(launches):
    model, ids = make(PLAIN), text(2, 5)
    _, cache = read(model, ids, cache=RwkvStaticCache())
    weight = model.rwkv.blocks[0].attention.output.weight
    old, weight.data = weight.data, weight.data * 1.5
    written = []
    for past in (cache.clone(), cache):
        model.native_decoding = past is cache
        written.append(model.generate(ids[:, :1], past_key_values=past, max_new_tokens=9, pad_token_id=0))
    same(*written)
    assert launches and old is not weight.data


# Which graph a static cache is given.


@pytest.fixture
def graph_of(launches, monkeypatch):
    """A function that says which graph computes the next token of a model for a static cache, a new one if none is
    given. Nothing is captured."""
    monkeypatch.setattr(decoding.Replay, "of", lambda *_: object())

    def graph_of(model, cache=None, sizes_of=None):
        cache = RwkvStaticCache() if cache is None else cache
        with torch.no_grad():
            (sizes_of or model)(text(5, 3, 31), past_key_values=cache, use_cache=True)
        return decoding._look(model, cache).plan._replay(model, text(5, 1, 31), cache, cache.stack)

    return graph_of


def _replace_embeddings(model):
    model.rwkv.embeddings.weight = nn.Parameter(model.rwkv.embeddings.weight * 2)


def _replace_data_of_embeddings(model):
    model.rwkv.embeddings.weight.data = model.rwkv.embeddings.weight.data * 2


def test_static_caches_share_a_graph(graph_of):
    model = make(PLAIN)
    assert graph_of(model) is graph_of(model)


@pytest.mark.parametrize("change", [_replace_embeddings, _replace_data_of_embeddings])
def test_no_graph_outlives_the_embeddings_that_it_reads(change, graph_of):
    model = make(PLAIN)
    before = graph_of(model)
    change(model)
    assert graph_of(model) is not before


def test_a_graph_of_modules_of_others_is_of_one_cache(graph_of):
    """Adapters can be switched off, and merged, without a change of any tensor's place."""
    peft = pytest.importorskip("peft")
    model, cache = make(PLAIN), RwkvStaticCache()
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["key"])).eval()
    first = graph_of(model, cache)
    assert graph_of(model, cache) is first and graph_of(model) is not first


def test_no_graph_is_used_in_training_and_one_is_after_it(graph_of):
    model = make(PLAIN).train()
    assert graph_of(model) is None
    assert graph_of(model.eval()) is not None
    assert graph_of(model.train()) is None


def test_a_state_in_another_dtype_is_not_what_others_are_converted_to(graph_of):
    """As after reading a file of this model in other bits: until modules have run, it stays so."""
    model, cache = make(PLAIN), RwkvStaticCache()
    usual, other = graph_of(model, cache), cache.to(torch.bfloat16)
    assert decoding._look(model, other).plan._replay(model, text(5, 1), other, other.stack) is not usual
    assert graph_of(model) is usual


def test_a_graph_is_not_given_the_state_of_another_model(graph_of):
    model = make(PLAIN)
    graph_of(model)
    with pytest.raises(ValueError, match="comes from another model"):
        graph_of(model, sizes_of=make("one layer"))
