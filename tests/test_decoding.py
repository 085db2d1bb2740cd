"""Laws about the next token computed at once: nobody can tell it from the modules' but by the clock."""

import copy
import math
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import ODD, PLAIN, SHAPES, agree, bits, both, contents, make, padded, read, same, text

from modeling_rwkv import RwkvCache, decoding
from rwkv_kernels import decode_cpu

WIDE = ODD | {"hidden_size": 200, "attention_hidden_size": 130, "intermediate_size": 333}
LARGE = ODD | {"hidden_size": 530, "intermediate_size": 3300, "num_hidden_layers": 1}
EVERY_SHAPE = {"plain": PLAIN, "odd": ODD, "wide": WIDE, "many tokens": ODD | {"vocab_size": 2305}, **SHAPES}
EVERY_SHAPE["tied"] = PLAIN | {"tie_word_embeddings": True}
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(params=decode_cpu.UNITS)
def unit(request, monkeypatch):
    """What multiplies bfloat16 and int8, if this CPU has it."""
    units = decode_cpu.UNITS
    if units.index(request.param) > units.index(decode_cpu.best_unit()):
        pytest.skip(f"this CPU, or its compiler, has no {request.param}")
    monkeypatch.setattr(decode_cpu, "best_unit", lambda: request.param)
    return request.param


@pytest.mark.parametrize("rows", [1, 2, 3, 7, 32])
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_logits_and_states_are_those_of_the_modules(shape, rows, steps):
    model = make(EVERY_SHAPE[shape])
    ids = text(rows, 9, model.config.vocab_size)
    (logits, cache), (expected, other) = both(model, ids)
    assert steps == [rows] * 6
    agree(logits, expected, atol=1e-4)
    agree(contents(cache), contents(other), atol=1e-4)
    assert cache.has_read(ids) and cache.seen_tokens == 9


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("shape", EVERY_SHAPE)
def test_in_half_precision_it_errs_no_more_than_the_modules(shape, dtype, unit, steps):
    model = make(EVERY_SHAPE[shape], dtype=dtype)
    ids = text(5, 40, model.config.vocab_size)
    exact, _ = read(copy.deepcopy(model).double(), ids)
    assert not steps  # float64 is for the modules
    (logits, cache), (ordinary, other) = both(model, ids)
    assert steps == [5] * 37 and logits.dtype == dtype
    assert [[x.dtype for x in layer] for layer in cache.layers] == [[x.dtype for x in layer] for layer in other.layers]
    assert (logits.double() - exact).norm() <= (ordinary.double() - exact).norm()


@pytest.mark.parametrize("dtype", HALVES)
def test_a_residual_stream_may_be_larger_than_float16(dtype, steps):
    model = make(ODD, dtype=dtype)
    with torch.no_grad():
        for block in model.rwkv.blocks:
            block.feed_forward.value.weight *= 100
    ids = text(2, 9)
    exact, _ = read(copy.deepcopy(model).double(), ids)
    (logits, _), (ordinary, _) = both(model, ids)
    assert steps and logits.isfinite().all()
    assert (logits.double() - exact).norm() <= 1.1 * (ordinary.double() - exact).norm()


def test_norms_and_vectors_may_be_of_more_bits_than_matrices(steps):
    model = make(ODD, dtype=torch.bfloat16)
    for name, x in model.named_parameters():
        if "ln" in name or "time_" in name:
            x.data = x.data.float()
    exact, _ = read(copy.deepcopy(model).double(), text(2, 20))
    (logits, _), (ordinary, _) = both(model, text(2, 20))
    assert steps and (logits.double() - exact).norm() <= (ordinary.double() - exact).norm()


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [ODD, WIDE])
def test_int8_of_torchao_is_read_as_it_is(shape, dtype, head, unit, steps):
    torchao = pytest.importorskip("torchao.quantization")
    model, exact = make(shape, dtype=dtype), make(shape, dtype=torch.float64)
    torchao.quantize_(model if head else model.rwkv.blocks, torchao.Int8WeightOnlyConfig())
    for x, quantized in zip(exact.parameters(), model.parameters(), strict=True):
        is_int8 = type(quantized).__name__ == "Int8Tensor"
        x.data = quantized.qdata * quantized.scale.double() if is_int8 else quantized.data.double()
    ids = text(3, 20)
    (logits, _), (ordinary, _) = both(model, ids)
    expected, _ = read(exact, ids)
    assert steps == [3] * 17 and logits.dtype == dtype
    assert (logits.double() - expected).norm() <= 1.5 * (ordinary.double() - expected).norm()


def test_int8_in_groups_is_left_to_the_modules(steps):
    torchao = pytest.importorskip("torchao.quantization")
    model = make(vocab_size=61, hidden_size=64, num_hidden_layers=1)
    torchao.quantize_(model.rwkv.blocks, torchao.Int8WeightOnlyConfig(granularity=torchao.PerGroup(32)))
    read(model, text(1, 5))
    assert not steps and "scales" in decoding.why_not(model)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True}])
def test_generation_writes_the_same(options, steps):
    model = make(ODD)
    ids, mask = padded([row[:n] for row, n in zip(text(2, 9), (4, 9), strict=True)])
    written = []
    for native in (True, False):
        model.native_decoding = native
        torch.manual_seed(5)
        written.append(model.generate(ids, attention_mask=mask, max_new_tokens=25, pad_token_id=0, **options))
    same(*written)
    assert len(steps) == 24


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "int8"])
def test_a_row_gives_the_same_bits_among_fewer(kind, unit, steps):
    model, ids = make(WIDE | {"intermediate_size": 1201}), text(15, 9)
    fewer = 2 if kind == "bfloat16" and unit == "amx" else 1
    if kind == "int8":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    elif kind == "bfloat16":
        model.bfloat16()
    _, cache = read(model, ids)
    for row in range(16 - fewer):
        part, rows = cache.clone(), torch.arange(row, row + fewer)
        part.batch_select_indices(rows)
        with torch.no_grad():
            some = model(ids[rows, -1:], past_key_values=part).logits
            all_rows = model(ids[:, -1:], past_key_values=cache.clone()).logits
        same(some, all_rows[rows])
    assert set(steps) == {fewer, 15}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_threads_nor_on_the_time(dtype, unit, steps):
    model, ids, before = make(ODD | {"hidden_size": 133}, dtype=dtype), text(3, 12), torch.get_num_threads()
    try:
        results = []
        for threads in (1, 1, 2, 3, 5):
            torch.set_num_threads(1)
            with torch.no_grad():
                cache = model(ids[:, :3]).past_key_values
                torch.set_num_threads(threads)
                logits = [model(token[:, None], past_key_values=cache).logits for token in ids[:, 3:].T]
            results.append((torch.cat(logits), cache.layers))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        same(result, results[0])
    assert len(steps) == 5 * 9


def test_ids_may_be_of_32_bits(steps):
    model, ids = make(ODD), text(2, 8)
    logits, cache = read(model, ids.int())
    same(logits, read(model, ids)[0])
    assert steps == [2] * 10 and cache.has_read(ids)


def test_states_are_a_list_of_tensors_of_their_own(steps):
    model, ids = make(ODD), text(2, 7)
    _, cache = read(model, ids)
    expected, untouched = cache.clone(), cache.clone()
    expected.layers[1].wkv.mul_(2)
    cache.layers[1] = cache.layers[1]._replace(wkv=cache.layers[1].wkv * 2)
    assert len({x.untyped_storage().data_ptr() for layer in cache.layers for x in layer}) == 9
    with torch.no_grad():
        found, other, plain = (model(ids[:, :1], past_key_values=x).logits for x in (cache, expected, untouched))
    same(found, other)
    assert not torch.allclose(found, plain) and steps[-3:] == [2, 2, 2]


@pytest.mark.parametrize("way", [lambda x: x, RwkvCache.clone, lambda x: x.to("cpu")])
def test_gradients_reach_the_states_after_a_token(way, steps):
    model, ids = make(ODD), text(2, 7)
    _, cache = read(model, ids)
    leaves = [part.requires_grad_() for layer in cache.layers for part in (layer.time_mix, layer.wkv)]
    found = torch.autograd.grad(model(ids[:, :2], past_key_values=way(cache)).logits.sum(), leaves)
    _, other = read(model, ids, native=False)
    leaves = [part.requires_grad_() for layer in other.layers for part in (layer.time_mix, layer.wkv)]
    expected = torch.autograd.grad(model(ids[:, :2], past_key_values=way(other)).logits.sum(), leaves)
    assert steps and all(x.abs().sum() > 0 for x in found)
    agree(found, expected, atol=1e-3)


def test_states_that_were_kept_stay_as_they_were(steps):
    model, ids = make(ODD), text(2, 5)
    weights = bits(model)
    with torch.no_grad():
        cache = model(ids).past_key_values
        model(ids[:, :1], past_key_values=cache)
        clone, held = cache.clone(), cache.detach()
        saved = copy.deepcopy(cache.layers)
        result = model(ids[:, :1], past_key_values=cache).past_key_values
    assert result is cache and len(steps) == 2
    same([clone.layers, held.layers], [saved, saved])
    assert clone.seen_tokens == 6 and cache.seen_tokens == 7
    assert bits(model) == weights


def test_a_cache_of_zeros_is_empty(steps):
    model, ids = make(ODD), text(2, 4)
    _, cache = read(model, ids)
    cache._apply(lambda x, _: torch.zeros_like(x))
    steps.clear()
    with torch.no_grad():
        logits = model(ids[:, :1], past_key_values=cache).logits
        agree(logits, model(ids[:, :1]).logits, atol=1e-4)
    assert steps == [2]


def test_an_initial_state_comes_before_the_first_token(steps):
    model = make(ODD)
    model.set_initial_state(read(model, text(1, 6))[1])
    steps.clear()
    (logits, _), (expected, _) = both(model, text(2, 9, seed=1))
    assert steps == [2] * 6
    agree(logits, expected, atol=1e-4)


def test_weights_that_are_not_finite_are_seen(steps):
    model, ids = make(ODD), text(3, 8)
    for place, value in ((7, float("nan")), (8, float("inf"))):
        with torch.no_grad():
            model.rwkv.blocks[1].feed_forward.key.weight[place, 36] = value
        (logits, cache), (expected, other) = both(model, ids)
        assert steps and logits.isnan().all() and expected.isnan().all()
        assert torch.equal(contents(cache)[0].isnan(), contents(other)[0].isnan())


@pytest.mark.parametrize("dtype", HALVES)
def test_the_smallest_weights_count(dtype, unit, steps):
    """Those with leading zeros, which a CPU may be told to take for zeros, are exact; so is what overflows."""
    if dtype == torch.bfloat16 and unit == "pairs":
        pytest.skip("to these instructions they are zeros")
    model, smallest = make(ODD, dtype=dtype), torch.tensor(1, dtype=torch.int16).view(dtype).item()
    with torch.no_grad():
        model.head.weight.copy_(torch.arange(61 * 37).view(61, 37) % 7 * smallest)
        model.rwkv.ln_out.bias.fill_(1e4)
    (logits, _), (ordinary, _) = both(model.float(), text(1, 6))
    steps.clear()
    found, _ = read(model.to(dtype), text(1, 6))
    assert len(steps) == 3
    agree(found.float(), logits, rtol=0.05, atol=0)
    agree(logits, ordinary, rtol=1e-4, atol=0)


@pytest.mark.parametrize(("shape", "share"), [(WIDE, 0.26), (WIDE, 0.76), (LARGE, 1)])
@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
def test_many_rows_are_read_in_parts_that_fit_in_a_cache(kind, shape, share, unit, steps):
    rows = math.ceil(share * decode_cpu.MOST_ROWS[unit][getattr(torch, kind)])
    model, ids = make(shape), text(rows, 6)
    if kind == "int8":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
        (logits, _), (expected, _) = both(model, ids)
        agree(logits, expected, atol=1e-4)
    else:
        (logits, _), (ordinary, _) = both(model.bfloat16(), ids)
        expected, _ = read(copy.deepcopy(model).double(), ids)
        assert (logits.double() - expected).norm() <= (ordinary.double() - expected).norm()
    assert steps == [rows] * 3


@pytest.mark.parametrize("kind", ["bfloat16", "int8"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e8])
def test_what_is_wrong_with_a_row_stays_in_it(value, kind, unit, steps):
    model, ids = make(WIDE), text(4, 6)
    if kind == "int8":
        torchao = pytest.importorskip("torchao.quantization")
        torchao.quantize_(model, torchao.Int8WeightOnlyConfig())
    else:
        model.bfloat16()
    _, cache = read(model, ids)
    broken = cache.clone()
    broken.layers[1].channel_mix[2, 77] = value
    with torch.no_grad():
        clean, found = (model(ids[:, :1], past_key_values=x).logits for x in (cache, broken))
    same(found[[0, 1, 3]], clean[[0, 1, 3]])
    assert found[2].isfinite().all() == (value == 1e8) and not torch.equal(found[2], clean[2])
    assert steps[-2:] == [4, 4]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_many_rows_are_for_the_modules(dtype, unit, steps):
    model, most = make(ODD, dtype=dtype), decode_cpu.MOST_ROWS[unit][dtype]
    read(model, text(most, 5))
    assert steps == [most] * 2
    read(model, text(most + 1, 5))
    assert steps == [most] * 2


def test_several_python_threads_may_write_at_once(steps):
    model, ids = make(ODD), text(2, 5)
    with ThreadPoolExecutor(4) as pool:
        written = list(pool.map(lambda _: model.generate(ids, max_new_tokens=15, pad_token_id=0), range(8)))
    same(written[1:], written[:1] * 7)
    assert len(steps) == 8 * 14
