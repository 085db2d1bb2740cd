"""Laws about the next token computed at once: nobody can tell it from the modules' but by the clock."""

import copy
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from models import PLAIN, SHAPES, TOLERANCE, agree, bits, contents, make, padded, same, text
from torch import nn

from modeling_rwkv import RwkvCache, decoding
from rwkv_kernels import decode_cpu
from rwkv_kernels.loader import Unavailable

ODD = {"vocab_size": 61, "hidden_size": 37, "attention_hidden_size": 50, "intermediate_size": 101}
ODD |= {"num_hidden_layers": 3, "rescale_every": 2}
EVERY_SHAPE = {"plain": PLAIN, "odd": ODD, "tied": PLAIN | {"tie_word_embeddings": True}, **SHAPES}
HALVES = (torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def steps(monkeypatch):
    """The rows of every token that was computed at once."""
    rows: list[int] = []
    step = decode_cpu.Decoder.step

    def counted(self, x, before):
        result = step(self, x, before)
        if result is not None:
            rows.append(len(x))
        return result

    monkeypatch.setattr(decode_cpu.Decoder, "step", counted)
    return rows


@torch.no_grad()
def read(model, ids, native=True, begin=3):
    """Logits of one token after another, and the cache, after ``begin`` tokens at once."""
    model.native_decoding = native
    cache = model(ids[:, :begin]).past_key_values
    logits = [model(token[:, None], past_key_values=cache).logits for token in ids[:, begin:].T]
    del model.native_decoding
    return torch.cat(logits, 1), cache


def both(model, ids):
    return read(model, ids), read(model, ids, native=False)


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
def test_in_half_precision_it_errs_no_more_than_the_modules(shape, dtype, steps):
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
def test_int8_of_torchao_is_read_as_it_is(dtype, head, steps):
    torchao = pytest.importorskip("torchao.quantization")
    model, exact = make(ODD, dtype=dtype), make(ODD, dtype=torch.float64)
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


def test_a_row_gives_the_same_bits_alone(steps):
    model, ids = make(ODD | {"intermediate_size": 1201}), text(23, 9)
    _, cache = read(model, ids)
    for row in range(23):
        alone = cache.clone()
        alone.batch_select_indices(torch.tensor([row]))
        with torch.no_grad():
            one = model(ids[row : row + 1, -1:], past_key_values=alone).logits
            all_rows = model(ids[:, -1:], past_key_values=cache.clone()).logits
        same(one[0], all_rows[row])
    assert set(steps) == {1, 23}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_depend_neither_on_threads_nor_on_the_time(dtype, steps):
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
    cache._apply(torch.zeros_like)
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


# Whoever changes the model meets the model as it is now.


def _edit(model):
    with torch.no_grad():
        model.rwkv.blocks[1].attention.key.weight[3] += 1
        model.rwkv.blocks[1].ln2.bias[2] += 1


def _edit_data(model):
    model.rwkv.blocks[1].feed_forward.time_mix_key.data[..., 1] = 0.3


def _replace_data(model):
    model.rwkv.blocks[0].attention.time_decay.data = model.rwkv.blocks[0].attention.time_decay.data + 1


def _replace_parameter(model):
    model.rwkv.blocks[2].feed_forward.value.weight = nn.Parameter(model.rwkv.blocks[2].feed_forward.value.weight * 2)


def _replace_module(model):
    new = nn.Linear(model.config.hidden_size, model.config.vocab_size, bias=False)
    model.set_output_embeddings(new)


def _replace_epsilon(model):
    model.rwkv.blocks[1].ln1.eps = 0.5


def _add_bias(model):
    model.head.bias = nn.Parameter(torch.arange(model.config.vocab_size) / 10)


def _resize(model):
    model.resize_token_embeddings(model.config.vocab_size + 3)


def _change_dtype(model):
    model.bfloat16()


CHANGES = (
    _edit, _edit_data, _replace_data, _replace_parameter, _replace_module, _replace_epsilon, _add_bias, _resize,
    _change_dtype,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_tokens_is_seen(change, steps):
    model, ids = make(ODD), text(2, 9)
    before, _ = read(model, ids)
    assert steps
    change(model)
    (logits, _), (expected, _) = both(model, ids)
    assert logits.shape != before.shape or not torch.allclose(logits.float(), before, **TOLERANCE)
    loose = {"rtol": 0.1, "atol": 0.3} if logits.dtype != torch.float32 else {"atol": 1e-4}
    agree(logits, expected, **loose)


# Where somebody could tell the difference, the modules run.


def _with_lora(model):
    peft = pytest.importorskip("peft")
    peft.get_peft_model(model, peft.LoraConfig(target_modules=["key"], init_lora_weights=False))


def _with_hook(model):
    model.rwkv.blocks[1].attention.output.register_forward_hook(lambda module, inputs, output: output * 2)


def _with_hook_on_embeddings(model):
    model.rwkv.embeddings.register_forward_hook(lambda module, inputs, output: output.roll(1, -1))


def _with_pre_hook(model):
    model.rwkv.blocks[1].ln1.register_forward_pre_hook(lambda module, inputs: (inputs[0] * 0.5 + 1,))


def _with_another_forward(model):
    model.head.forward = lambda x: nn.functional.linear(x, model.head.weight) + 1


def _with_parametrization(model):
    class Twice(nn.Module):
        def forward(self, x):
            return 2 * x

    nn.utils.parametrize.register_parametrization(model.rwkv.blocks[0].feed_forward.key, "weight", Twice())


def _with_another_module(model):
    model.rwkv.blocks[0].feed_forward.key = nn.Sequential(model.rwkv.blocks[0].feed_forward.key, nn.Tanh())


WATCHED = (
    _with_lora, _with_hook, _with_hook_on_embeddings, _with_pre_hook, _with_another_forward, _with_parametrization,
    _with_another_module,
)  # fmt: skip


@pytest.mark.parametrize("watch", WATCHED)
def test_the_modules_run_where_somebody_put_something_between(watch, steps):
    model, ids = make(ODD), text(2, 1)
    with torch.no_grad():
        past = model(text(2, 4)).past_key_values
        before = model(ids, past_key_values=past.clone()).logits
        assert steps.pop() and decoding.why_not(model) is None
        watch(model)
        after = model(ids, past_key_values=past.clone()).logits
        assert not steps and decoding.why_not(model)
        model.native_decoding = False
        same(after, model(ids, past_key_values=past.clone()).logits)
    assert not torch.allclose(before, after)


@pytest.mark.parametrize("earlier", [False, True])
def test_the_modules_run_where_their_class_was_changed(earlier, monkeypatch, steps):
    model, ids = make(ODD), text(2, 6)
    if earlier:
        read(model, ids)
        assert steps
    with monkeypatch.context() as patch:
        kind = type(model.rwkv.blocks[0].feed_forward)
        patch.setattr(kind, "forward", lambda self, x, *_: 3 * x)
        steps.clear()
        (logits, _), (expected, _) = both(model, ids)
        same(logits, expected)
        assert not steps and "RwkvChannelMix" in decoding.why_not(model)
    read(model, ids)
    assert steps


def test_weights_that_are_not_finite_are_seen(steps):
    model, ids = make(ODD), text(3, 8)
    for place, value in ((7, float("nan")), (8, float("inf"))):
        with torch.no_grad():
            model.rwkv.blocks[1].feed_forward.key.weight[place, 36] = value
        (logits, cache), (expected, other) = both(model, ids)
        assert steps and logits.isnan().all() and expected.isnan().all()
        assert torch.equal(contents(cache)[0].isnan(), contents(other)[0].isnan())


@pytest.mark.parametrize("dtype", HALVES)
def test_the_smallest_weights_count(dtype, steps):
    """Those with leading zeros, which a CPU may be told to take for zeros, are exact; so is what overflows."""
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


def test_several_python_threads_may_write_at_once(steps):
    model, ids = make(ODD), text(2, 5)
    with ThreadPoolExecutor(4) as pool:
        written = list(pool.map(lambda _: model.generate(ids, max_new_tokens=15, pad_token_id=0), range(8)))
    same(written[1:], written[:1] * 7)
    assert len(steps) == 8 * 14


def test_it_can_be_switched_off(steps):
    model = make(ODD)
    model.native_decoding = False
    model.generate(text(2, 3), max_new_tokens=4)
    assert not steps and "native_decoding" in decoding.why_not(model)
    model.native_decoding = True
    model.generate(text(2, 3), max_new_tokens=4)
    assert steps == [2] * 3


def test_a_hook_that_is_gone_is_forgotten(steps):
    model = make(ODD)
    handle = model.rwkv.ln_out.register_forward_hook(lambda *_: None)
    read(model, text(1, 5))
    assert not steps
    handle.remove()
    read(model, text(1, 5))
    assert len(steps) == 2


CALLS = {
    "embeddings": lambda model, ids: {"inputs_embeds": model.get_input_embeddings()(ids)},
    "two tokens": lambda model, ids: {"input_ids": ids.repeat(1, 2)},
    "labels": lambda model, ids: {"input_ids": ids, "labels": ids},
    "hidden states": lambda model, ids: {"input_ids": ids, "output_hidden_states": True},
    "no cache": lambda model, ids: {"input_ids": ids, "use_cache": False},
    "some logits": lambda model, ids: {"input_ids": ids, "logits_to_keep": torch.tensor([0])},
    "a row with nothing to read": lambda model, ids: {"input_ids": ids, "attention_mask": torch.tensor([[1], [0]])},
}


@pytest.mark.parametrize("call", CALLS)
def test_the_modules_run_where_more_is_asked_for(call, steps):
    model, ids = make(ODD), text(2, 1)
    with torch.no_grad():
        past = model(text(2, 4)).past_key_values
        arguments = CALLS[call](model, ids)
        found = model(**arguments, past_key_values=past.clone())
        model.native_decoding = False
        expected = model(**arguments, past_key_values=past.clone())
    assert not steps and found.keys() == expected.keys()
    same(found.logits, expected.logits)


def test_autograd_autocast_and_traces_see_the_modules(steps):
    model, ids = make(ODD), text(2, 1)
    with torch.no_grad():
        past = model(text(2, 4)).past_key_values
    model(ids, past_key_values=past).logits.sum().backward()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        model(ids, past_key_values=past.clone())
    with torch.no_grad():
        torch.compile(lambda ids, past: model(ids, past_key_values=past).logits, backend="eager")(ids, past.clone())
    assert not steps and model.head.weight.grad is not None
    with torch.inference_mode():
        model(ids, past_key_values=past.clone())
    assert steps == [2]


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 32), (torch.bfloat16, 16), (torch.float16, 32)])
def test_many_rows_are_for_the_modules(dtype, most, steps):
    model = make(ODD, dtype=dtype)
    read(model, text(most, 5))
    assert steps == [most] * 2
    read(model, text(most + 1, 5))
    assert steps == [most] * 2


@pytest.mark.parametrize("rows", [2, 9])
def test_a_hook_on_embeddings_hears_each_token_once(rows):
    model, heard = make(ODD), []
    model.rwkv.embeddings.register_forward_hook(lambda *_: heard.append(1))
    read(model, text(rows, 7))
    assert len(heard) == 5


def test_a_state_that_is_laid_out_otherwise_is_for_the_modules(steps):
    model, ids = make(ODD), text(2, 4)
    _, cache = read(model, ids)
    steps.clear()
    expanded = cache.clone()
    expanded._apply(lambda x: x[:1].expand_as(x))
    wide = cache.to(torch.float64)
    with torch.no_grad():
        found = model(ids[:, :1], past_key_values=expanded.clone()).logits
        assert steps.pop()
        agree(model(ids[:, :1], past_key_values=expanded).logits, found, atol=1e-4)
        model(ids[:, :1], past_key_values=wide)
    assert not steps


def test_errors_are_those_of_the_modules(steps):
    model, ids = make(ODD), text(2, 4)
    _, cache = read(model, ids)
    with torch.no_grad():
        with pytest.raises(ValueError, match="has 2 rows but the batch has 1"):
            model(ids[:1, :1], past_key_values=cache)
        with pytest.raises(ValueError, match="state="):
            model(ids[:, :1], past_key_values=cache, state=[])
        with pytest.raises(ValueError, match="comes from another model"):
            model(ids[:, :1], past_key_values=read(make(PLAIN), ids)[1])
        with pytest.raises(ValueError, match="attention_mask has shape"):
            model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(3, 1))
        with pytest.raises(IndexError):
            model(torch.full((2, 1), 61), past_key_values=cache)


def test_without_a_compiler_the_modules_run(monkeypatch, steps):
    def library():
        raise Unavailable("No C++ compiler builds decode_cpu.cpp. Install one.")

    monkeypatch.setattr(decode_cpu, "_library", library)
    model = make(ODD)
    read(model, text(2, 6))
    assert not steps and decoding.why_not(model).startswith("No C++ compiler")


def test_models_are_forgotten_and_copied(steps):
    model = make(ODD)
    read(model, text(1, 5))
    copied = copy.deepcopy(model)
    _edit(copied)
    same(read(model, text(1, 5))[0], read(make(ODD), text(1, 5))[0])
    plans = len(decoding._plans)
    del model
    assert len(decoding._plans) < plans
    assert isinstance(read(copied, text(1, 5))[1], RwkvCache)
