"""Laws about a state that is written over, and about the graphs that compute its next token. Nothing is captured."""

import contextlib
import copy
import gc
import pickle
import sys
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_on_cpu import decoding_emulated
from models import PLAIN, agree, contents, make, read, same, text
from torch import nn

from modeling_rwkv import RwkvStaticCache, decoding
from modeling_rwkv.static_cache import Replay
from rwkv_kernels import decode_cuda
from rwkv_kernels.decode_weights import Stack


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


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy, lambda cache: pickle.loads(pickle.dumps(cache))])
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


KEEPING = copy.copy, RwkvStaticCache.clone, RwkvStaticCache.detach, lambda cache: cache.to("cpu")


@pytest.mark.parametrize("keep", KEEPING)
def test_what_is_kept_of_a_static_cache_is_not_written_over(keep, launches):
    model, ids = make(PLAIN), text(2, 5)
    _, cache = read(model, ids, cache=RwkvStaticCache())
    _, expected = read(model, ids)
    kept = keep(cache)
    with torch.no_grad():
        for token in ids.T:
            model(token[:, None], past_key_values=cache, use_cache=True)
    same(contents(kept), contents(expected))


def test_a_static_cache_writes_over_no_stack_of_others(launches):
    model, ids = make(PLAIN), text(2, 5)
    _, plain = read(model, ids)
    stack, static = plain.stack, RwkvStaticCache()
    static.stack, static.seen_tokens = stack, 5
    before = [x.clone() for x in stack]
    with torch.no_grad():
        for token in ids.T:
            model(token[:, None], past_key_values=static, use_cache=True)
    same(list(stack), before)


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


# How caches take turns in a graph. Instead of being replayed, what would have been captured runs.


class Played(Replay):
    def __init__(self, model, decoder, table, states):
        self._decoder, self._table, self._model = decoder, table, model
        self._lock, self._owner = threading.RLock(), weakref.ref(RwkvStaticCache())
        self._ids = torch.zeros(states.wkv.shape[1], 1, dtype=torch.long)
        self._stack, self._graph = Stack(*map(torch.clone, states)), self

    def replay(self):
        self._logits = self._read(self._model)

    def _at_home(self):
        return contextlib.nullcontext()

    def _hand_over(self, cache):
        """There are no streams."""

    def write(self, cache, ids):
        with torch.no_grad():
            logits = self.step(ids, cache)
            cache.advance(None, 1, ids, None)
        return logits


@pytest.mark.parametrize("by_modules", [False, True])
@pytest.mark.parametrize("rows", [1, decode_cuda.MOST_ROWS + 1])
def test_caches_take_turns_in_a_graph(rows, by_modules, launches):
    model, texts, caches, clones = make(PLAIN), [text(rows, 9, seed=seed) for seed in (1, 2)], [], []
    expected = [read(model, ids, native=False) for ids in texts]
    plan = decoding._plan_of(model)
    for ids in texts:
        caches.append(RwkvStaticCache())
        with torch.no_grad():
            model(ids[:, :3], past_key_values=caches[-1], use_cache=True)
    decoder, table = (None, None) if by_modules else (plan.decoder, plan.table)
    graph = Played(model, decoder, table, caches[0].stack)
    for i in range(3, 9):
        for cache, ids, (logits, _) in zip(caches, texts, expected, strict=True):
            agree(graph.write(cache, ids[:, i : i + 1]), logits[:, i - 3], atol=1e-4)
            if i == 5:  # somebody looks: what they hold is a copy, and they go on
                clones.append(cache.clone())
                held = [x.clone() for layer in cache.layers for x in layer]
                same([x for layer in cache.layers for x in layer], held)
    for cache, clone, ids, (logits, last) in zip(caches, clones, texts, expected, strict=True):
        agree(contents(cache), contents(last), atol=1e-4)
        assert cache.has_read(ids)
        agree(graph.write(clone, ids[:, 6:7]), logits[:, 3], atol=1e-4)
        agree(contents(cache), contents(last), atol=1e-4)


def test_a_cache_that_lives_in_a_graph_writes_elsewhere_without_it(launches):
    """What it leaves there may be another cache's by then."""
    model, ids = make(PLAIN), text(2, 9)
    plan, caches = decoding._plan_of(model), [read(model, ids, cache=RwkvStaticCache())[1] for _ in range(2)]
    graph = Played(model, plan.decoder, plan.table, caches[0].stack)
    graph.write(caches[0], ids[:, :1])
    with torch.no_grad():
        model(ids[:, :1], past_key_values=caches[0], use_cache=True)
    graph.write(caches[1], ids[:, :1])
    before = copy.deepcopy(contents(caches[1]))
    with torch.no_grad():
        for _ in range(3):
            model(ids[:, :1], past_key_values=caches[0], use_cache=True)
    same(contents(caches[1]), before)


@pytest.mark.parametrize("keep", KEEPING)
def test_what_is_kept_of_a_cache_in_a_graph_is_not_written_over(keep, launches):
    model, ids = make(PLAIN), text(2, 9)
    plan, caches = decoding._plan_of(model), [read(model, ids, cache=RwkvStaticCache())[1] for _ in range(2)]
    graph = Played(model, plan.decoder, plan.table, caches[0].stack)
    graph.write(caches[0], ids[:, :1])
    alone = caches[1].clone()
    Played(model, plan.decoder, plan.table, alone.stack).write(alone, ids[:, :1])
    assert caches[0].lives_in(graph._stack)
    kept = keep(caches[0])
    for cache in caches:
        graph.write(cache, ids[:, 1:2])
    same(contents(kept), contents(alone))


def test_a_state_in_a_graph_is_not_captured_by_somebody_else(launches, monkeypatch):
    """What is captured could not wait for it."""
    model, ids = make(PLAIN), text(2, 9)
    plan, cache = decoding._plan_of(model), read(model, ids, cache=RwkvStaticCache())[1]
    clone = cache.clone()
    Played(model, plan.decoder, plan.table, cache.stack).write(cache, ids[:, :1])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with torch.no_grad():
        model(ids[:, :1], past_key_values=clone, use_cache=True)
        with pytest.raises(RuntimeError, match="clone"):
            model(ids[:, :1], past_key_values=cache, use_cache=True)


def test_what_has_been_in_a_graph_does_not_come_back_after_a_reset(launches, monkeypatch):
    model, ids = make(PLAIN), text(2, 9)
    plan, caches = decoding._plan_of(model), [read(model, ids, cache=RwkvStaticCache())[1] for _ in range(2)]
    graph = Played(model, plan.decoder, plan.table, caches[0].stack)
    graph.write(caches[0], ids[:, :1])
    clone, signals = torch.clone, [1]

    def interrupted(x):
        """A signal's handler resets the cache that is being moved out."""
        if signals:
            signals.pop()
            caches[0].reset()
        return clone(x)

    monkeypatch.setattr(torch, "clone", interrupted)
    graph.write(caches[1], ids[:, :1])
    assert not signals and not caches[0].is_initialized and caches[0].seen_tokens == 0


@pytest.fixture
def quick_switches():
    """Threads are interrupted as often as can be."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    yield
    sys.setswitchinterval(before)


def test_threads_take_turns_in_a_graph(quick_switches, monkeypatch):
    """Each writes, now and then keeps or reorders what it has, and has what it would have alone."""
    # PyTorch without CUDA cannot say whether it captures.
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    threads, steps = 4, 24
    model, texts = make(PLAIN), [text(2, steps, seed=seed) for seed in range(threads)]
    starts = [read(model, ids[:, :4], native=False, cache=RwkvStaticCache())[1] for ids in texts]

    def written(write, cache, ids):
        kept = []
        for i, token in enumerate(ids.T):
            write(cache, token[:, None])
            if i % 3 == 1:
                cache.reorder_cache(torch.tensor([1, 0]))
            if i % 3 == 2:
                kept.append(cache.clone())
        return [contents(x) for x in [*kept, cache]]

    def alone(cache, token):
        with torch.no_grad():
            model(token, past_key_values=cache, use_cache=True)

    model.native_decoding = False
    expected = [written(alone, cache.clone(), ids) for cache, ids in zip(starts, texts, strict=True)]
    graph = Played(model, None, None, starts[0].stack)
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(written, [graph.write] * threads, starts, texts))
    agree(found, expected, atol=1e-5)


def test_threads_share_a_plan_and_so_its_graphs(quick_switches):
    models = [make(PLAIN) for _ in range(5)]
    with ThreadPoolExecutor(4) as pool:
        for model in models:
            assert len(set(pool.map(decoding._plan_of, [model] * 4))) == 1


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
