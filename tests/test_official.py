"""Parity with the official `rwkv` package and with the RWKV built into transformers, and what the latter gets wrong.

Each law of the second half holds here and is shown to fail on the built-in model, with the same weights.
"""

import copy
import math

import pytest
import torch
from models import PLAIN, SHAPES, agree, bits, gradients, make, padded, randomise, same, text
from torch.profiler import ProfilerActivity, profile
from transformers.models.rwkv.configuration_rwkv import RwkvConfig as BuiltinConfig
from transformers.models.rwkv.modeling_rwkv import RwkvForCausalLM as Builtin

from modeling_rwkv import RwkvConfig, RwkvForCausalLM
from rwkv_kernels.wkv4 import wkv4

PARITY = {"rtol": 0, "atol": 1e-4}

# The three sizes that every implementation can run, in its own spelling of the names.
ODD = {name: SHAPES[name] | {"layer_norm_epsilon": 1e-5} for name in SHAPES if name != "one channel"}
OFFICIAL_NAMES = {
    "rwkv.embeddings.": "emb.",
    "rwkv.": "",
    ".pre_ln.": ".ln0.",
    ".attention.": ".att.",
    ".feed_forward.": ".ffn.",
    "time_mix_key": "time_mix_k",
    "time_mix_value": "time_mix_v",
    "time_mix_receptance": "time_mix_r",
}


def official(model, folder):
    """The same weights in the official package, read from a `.pth` file."""
    from rwkv.model import RWKV

    weights = {}
    for name, x in model.state_dict().items():
        for ours, theirs in OFFICIAL_NAMES.items():
            name = name.replace(ours, theirs)
        weights[name] = x.clone()
    torch.save(weights, folder / "model.pth")
    return RWKV(model=str(folder / "model"), strategy="cpu fp32", verbose=False)


@pytest.mark.parametrize("shape", ODD)
@pytest.mark.parametrize("attention", ["as wide", "its own size"])
@torch.no_grad()
def test_logits_are_those_of_the_official_package(shape, attention, tmp_path):
    """The official package reads a text at once only where attention is as wide as the model, and else by tokens."""
    sizes = dict(ODD[shape])
    if attention == "as wide":
        sizes.pop("attention_hidden_size", None)
    elif "attention_hidden_size" not in sizes:
        pytest.skip("attention is as wide as this model")
    model = make(sizes)
    peer = official(model, tmp_path)
    ids = text(1, 41, model.config.vocab_size)
    whole = model(ids).logits[0]
    assert whole.std() > 0.5
    if attention == "as wide":
        expected, _ = peer.forward(ids[0].tolist(), None, full_output=True)
        agree(whole, expected, **PARITY)

    state, cache = None, None
    for t, token in enumerate(ids[0].tolist()):
        expected, state = peer.forward([token], state)
        output = model(ids[:, t : t + 1], past_key_values=cache)
        cache = output.past_key_values
        agree(output.logits[0, 0], expected, **PARITY)
        agree(whole[t], expected, **PARITY)


@pytest.mark.parametrize("shape", [name for name in ODD if name != "one layer"])
@torch.no_grad()
def test_logits_are_those_of_the_builtin_model(shape, tmp_path):
    """From one folder. In eval mode the built-in model halves its stream, and its layer norms see another epsilon."""
    model = make(ODD[shape])
    model.save_pretrained(tmp_path)
    ids = text(3, 41, model.config.vocab_size)
    ours = RwkvForCausalLM.from_pretrained(tmp_path)(ids).logits
    same(ours, model(ids).logits)
    assert ours.std() > 0.5
    peer = Builtin.from_pretrained(tmp_path)
    agree(ours, peer.train()(ids).logits, **PARITY)
    peer.config.rescale_every = 0
    agree(ours, peer.eval()(ids, use_cache=False).logits, **PARITY)


@torch.no_grad()
def test_logits_are_those_of_the_builtin_model_that_rescales(tmp_path):
    model = make(PLAIN, rescale_every=6, num_hidden_layers=8)
    model.save_pretrained(tmp_path)
    ids = text(1, 41)
    agree(model(ids).logits, Builtin.from_pretrained(tmp_path).eval()(ids).logits, **PARITY)


# What the built-in model gets wrong. A law takes both families; `raises` says how the built-in one fails.


def law(raises=AssertionError):
    failing = pytest.param("builtin", marks=pytest.mark.xfail(strict=True, raises=raises))
    return pytest.mark.parametrize("family", ["ours", failing])


def build(family, **changes):
    """The same random weights in either implementation."""
    if family == "ours":
        return make(**changes)
    config = BuiltinConfig(**{"bos_token_id": None, "eos_token_id": None} | PLAIN | changes)
    return randomise(Builtin(config)).eval()


def continued(output):
    """The arguments that continue from an output."""
    name = "state" if "state" in output else "past_key_values"
    return {name: output[name]}


def snapshot(state):
    return [x.clone() for x in (state if isinstance(state, list) else [x for layer in state.layers for x in layer])]


@law()
@torch.no_grad()
def test_1_left_padding_changes_nothing(family):
    model = build(family)
    rows = [text(1, n)[0] for n in (5, 9)]
    ids, mask = padded(rows)
    for row, logits in zip(rows, model(ids, attention_mask=mask).logits, strict=True):
        agree(logits[-len(row) :], model(row[None]).logits[0])


@law(raises=(AssertionError, ValueError, RuntimeError))
def test_1_a_batch_generates_what_its_rows_generate(family):
    model = build(family)
    ids = text(2, 7)
    options = {"max_new_tokens": 9, "do_sample": False, "pad_token_id": 0}
    together = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    alone = [model.generate(row[None], attention_mask=torch.ones_like(row[None]), **options) for row in ids]
    same(together, torch.cat(alone))


@law()
@torch.no_grad()
def test_2_an_evaluation_changes_no_weight(family):
    model = build(family)
    before = bits(model.train())
    model.eval()(text(1, 5))
    assert bits(model) == before


@law()
@torch.no_grad()
def test_2_lora_computes_the_same_in_training_and_evaluation(family):
    from peft import LoraConfig, get_peft_model

    model = build(family).train()
    config = LoraConfig(target_modules=["output"], lora_dropout=0.0, init_lora_weights=False)
    model = get_peft_model(model, config)
    ids = text(1, 11)
    in_training = model.train()(ids, use_cache=False).logits
    agree(model.eval()(ids, use_cache=False).logits, in_training)


@law(raises=(AssertionError, AttributeError, TypeError, ValueError))
def test_3_beam_search_with_a_cache_is_beam_search_without(family):
    model = build(family)
    ids = text(2, 7)
    options = {"max_new_tokens": 9, "num_beams": 3, "do_sample": False, "pad_token_id": 0}
    options |= {"attention_mask": torch.ones_like(ids)}
    same(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


# Point 4 is about a GPU kernel that the built-in model needs; these are the same laws where they can be seen.


def test_4_training_reads_texts_longer_than_the_context_length():
    model = make(context_length=8)
    ids = text(1, 1100)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
    model(inputs_embeds=embeds).logits[0, -1].sum().backward()
    assert embeds.grad[0, 1024:].any(dim=-1).all()
    model.config.context_length = 4096
    agree(model(ids).logits, make(context_length=4096)(ids).logits)


def test_4_gradients_of_a_batch_are_the_sums_of_its_rows():
    model = make()
    ids = text(3, 17)
    model(ids).logits.square().sum().backward()
    together = gradients(model)
    for row in ids:
        model(row[None]).logits.square().sum().backward()
    agree(together, gradients(model), rtol=1e-3, atol=1e-3)


def test_4_a_forward_that_returns_a_state_reads_the_incoming_one():
    model = make()
    ids = text(2, 17)
    past = model(ids[:, :6]).past_key_values
    output = model(ids[:, 6:], past_key_values=past, use_cache=True)
    agree(output.logits, model(ids).logits[:, 6:])
    assert (model(ids[:, 6:]).logits[:, 0] - output.logits[:, 0]).abs().max() > 0.1


@law(raises=RuntimeError)
def test_5_gradients_flow_through_a_state(family):
    model = build(family)
    ids = text(1, 12)
    model(ids, use_cache=False).logits[:, 8:].square().sum().backward()
    whole = gradients(model)
    first = model(ids[:, :8], use_cache=True)
    model(ids[:, 8:], use_cache=True, **continued(first)).logits.square().sum().backward()
    agree(gradients(model), whole, rtol=1e-3, atol=1e-3)


@law()
def test_5_a_pass_with_gradients_leaves_the_given_state_alone(family):
    model = build(family)
    with torch.no_grad():
        given = continued(model(text(1, 8), use_cache=True))
    (state,) = given.values()
    before = snapshot(state)
    model(text(1, 4), use_cache=True, **given)
    same(snapshot(state), before)


def test_6_an_implementation_that_cannot_run_is_refused_and_not_replaced():
    x = torch.zeros(1, 4, 3)
    with pytest.raises((ValueError, RuntimeError)):
        wkv4(x[0, 0], x[0, 0], x, x, backend="cuda")  # of tensors that are on a CPU


@law()
def test_7_time_first_begins_as_in_the_paper(family):
    model = (RwkvForCausalLM if family == "ours" else Builtin)(
        (RwkvConfig if family == "ours" else BuiltinConfig)(**PLAIN)
    )
    zigzag = torch.tensor([0.0, 0.5, -0.5]).repeat(8)
    for block in model.rwkv.blocks:
        agree(block.attention.time_first.detach(), math.log(0.3) + zigzag)


@law(raises=ZeroDivisionError)
def test_7_a_model_may_have_one_layer(family):
    assert build(family, num_hidden_layers=1)(text(1, 5)).logits.isfinite().all()


@law(raises=RuntimeError)
@torch.no_grad()
def test_8_attention_may_have_its_own_size_with_a_cache(family):
    model = build(family, attention_hidden_size=13)
    ids = text(1, 9)
    whole = model(ids, use_cache=False).logits
    first = model(ids[:, :4], use_cache=True)
    agree(model(ids[:, 4:], use_cache=True, **continued(first)).logits, whole[:, 4:])


@law()
@torch.no_grad()
def test_8_the_configured_epsilon_is_that_of_every_layer_norm(family):
    model = build(family, layer_norm_epsilon=0.25)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    assert len(norms) == 8 and {norm.eps for norm in norms} == {0.25}


@law()
@torch.no_grad()
def test_9_operations_grow_slower_than_the_text(family):
    model = build(family, num_hidden_layers=1) if family == "ours" else build(family, num_hidden_layers=2)

    def operations(length):
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            model(text(1, length), use_cache=False)
        return sum(event.count for event in profiler.key_averages())

    operations(8)
    assert operations(1024) < 8 * operations(64)


def test_the_builtin_models_mistakes_are_not_in_the_weights(tmp_path):
    """What a built-in model computes with no cache, padding or evaluation behind it, is what this one computes."""
    peer = build("builtin")
    ours = make()
    ours.load_state_dict(copy.deepcopy(peer.state_dict()))
    ids = text(2, 9)
    agree(ours.train()(ids).logits, peer.train()(ids).logits)
