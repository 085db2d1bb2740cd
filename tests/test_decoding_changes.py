"""Laws about who meets the next token computed at once: whoever could tell the difference gets the modules."""

import copy
import gc
import inspect

import pytest
import torch
from models import ODD, PLAIN, TOLERANCE, agree, both, make, read, same, text
from torch import nn
from transformers import GenerationMixin, LogitsProcessor

from modeling_rwkv import RwkvCache, decoding
from modeling_rwkv.cache import LayerState
from rwkv_kernels import decode_cpu
from rwkv_kernels.loader import Unavailable

pytestmark = pytest.mark.usefixtures("steps")


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


def _limit_embeddings(model):
    model.rwkv.embeddings.max_norm = 0.1


def _add_bias(model):
    model.head.bias = nn.Parameter(torch.arange(model.config.vocab_size) / 10)


def _resize(model):
    model.resize_token_embeddings(model.config.vocab_size + 3)


def _change_dtype(model):
    model.bfloat16()


CHANGES = (
    _edit, _edit_data, _replace_data, _replace_parameter, _replace_module, _replace_epsilon, _limit_embeddings,
    _add_bias, _resize, _change_dtype,
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


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_between_two_texts_is_seen(change, steps):
    model, ids = make(ODD), text(2, 4)
    model.generate(ids, max_new_tokens=4, pad_token_id=0)
    assert steps
    change(model)
    written = []
    for native in (True, False):
        model.native_decoding = native
        written.append(scores(model, ids))
    loose = {"rtol": 0.1, "atol": 0.3} if model.dtype != torch.float32 else {"atol": 1e-4}
    agree(*written, **loose)


class Between(LogitsProcessor):
    """Does something to a model while it writes, before the third token."""

    def __init__(self, change):
        self.change, self.calls = change, 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        if self.calls == 2:
            self.change()
        return scores


def scores(model, ids, change=None):
    """Of four new tokens, with ``change`` before the third."""
    given = {"logits_processor": [Between(lambda: change(model))]} if change else {}
    result = model.generate(
        ids, max_new_tokens=4, pad_token_id=0, output_logits=True, return_dict_in_generate=True, **given
    )
    return torch.stack(result.logits)


@pytest.mark.parametrize("change", [_edit, _edit_data])
def test_an_edit_while_a_text_is_written_is_seen(change, steps):
    model, ids = make(ODD), text(2, 4)
    untouched = scores(model, ids)
    found = scores(model, ids, change)
    assert steps == [2] * 6
    same(found[:2], untouched[:2])
    assert not torch.allclose(found[2], untouched[2])
    other = make(ODD)
    other.native_decoding = False
    agree(found, scores(other, ids, change), atol=1e-4)


def _replace_embeddings(model):
    model.rwkv.embeddings.weight.data = model.rwkv.embeddings.weight.data * 2


@pytest.mark.parametrize("change", [_replace_data, _replace_parameter, _replace_module, _replace_embeddings])
def test_what_is_replaced_while_a_text_is_written_is_read_to_its_end(change, steps):
    def replace(model):
        change(model)
        gc.collect()
        kept.append([torch.full((37, 37), torch.nan) for _ in range(99)])  # where the old weights would have been

    model, ids, kept = make(ODD), text(2, 4), []
    untouched = scores(model, ids)
    same(scores(model, ids, replace), untouched)
    assert kept and steps == [2] * 6
    assert not torch.allclose(scores(model, ids), untouched)


def test_a_model_is_looked_at_once_for_a_text(monkeypatch, steps):
    looks, look = [], decoding._Plan.holds
    monkeypatch.setattr(decoding._Plan, "holds", lambda plan: looks.append(plan) or look(plan))
    model, ids = make(ODD), text(2, 9)
    for _ in range(3):
        model.generate(ids, max_new_tokens=9, pad_token_id=0)
    assert len(steps) == 24 and len(looks) == 2  # the first text finds the weights
    read(model, ids)
    assert len(looks) == 8


def test_generate_is_that_of_transformers_to_who_looks(steps):
    model, ids = make(ODD), text(2, 4)
    assert inspect.signature(model.generate) == inspect.signature(GenerationMixin.generate.__get__(model))
    given = {"max_new_tokens": 3, "pad_token_id": 0}
    same(model.generate.__wrapped__(model, ids, **given), model.generate(ids, **given))  # with autograd


def test_models_that_write_within_each_other_are_told_apart(steps):
    outer, inner, ids = make(ODD), make(PLAIN), text(2, 4)
    expected = scores(inner, ids)
    found = []
    scores(outer, ids, lambda model: found.append(scores(inner, ids)) or found.append(read(model, ids)))
    same(found[0], expected)
    same(found[1][0], read(outer, ids)[0])


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


def test_embeddings_are_read_as_their_module_gives_them(monkeypatch, steps):
    model, ids = make(ODD), text(2, 7)
    plain, _ = read(model, ids)
    weight = model.rwkv.embeddings.weight
    model.rwkv.embeddings.weight = nn.Parameter(torch._neg_view(-weight.detach()))
    same(read(model, ids)[0], plain)
    model.rwkv.embeddings.weight = weight
    forward = nn.Embedding.forward
    monkeypatch.setattr(nn.Embedding, "forward", lambda self, x: forward(self, x) * 2)
    (logits, _), (expected, _) = both(model, ids)
    agree(logits, expected, atol=1e-4)
    assert not torch.allclose(logits, plain) and steps == [2] * 12


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


@pytest.mark.parametrize("rows", [2, 9])
def test_a_hook_on_embeddings_hears_each_token_once(rows):
    model, heard = make(ODD), []
    model.rwkv.embeddings.register_forward_hook(lambda *_: heard.append(1))
    read(model, text(rows, 7))
    assert len(heard) == 5


def test_a_state_that_is_laid_out_otherwise_is_read_and_one_of_other_bits_is_for_the_modules(steps):
    model, ids = make(ODD), text(2, 4)
    _, cache = read(model, ids)
    steps.clear()
    expanded = cache.clone()
    expanded.layers = [LayerState(*(x[:1].expand_as(x) for x in layer)) for layer in expanded.layers]
    wide = cache.to(torch.float64)
    with torch.no_grad():
        found = model(ids[:, :1], past_key_values=expanded.clone()).logits
        same(model(ids[:, :1], past_key_values=expanded).logits, found)
        assert steps == [2, 2]
        model(ids[:, :1], past_key_values=wide)
    assert steps == [2, 2]


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
        for wrong in (61, -1):
            with pytest.raises(IndexError):
                model(torch.full((2, 1), wrong), past_key_values=cache)
        other = cache.clone()
        other.layers[1] = other.layers[1]._replace(time_mix=other.layers[1].time_mix[:1])
        with pytest.raises(ValueError, match="shape"):
            model(ids[:, :1], past_key_values=other)


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
