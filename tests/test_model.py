"""Laws of the model as transformers sees it: names, files, dtypes, initialisation, arguments, devices, compilation."""

import json
import math

import pytest
import torch
from models import PLAIN, SHAPES, agree, bits, contents, make, randomise, same, text
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_rwkv import RwkvConfig, RwkvForCausalLM, RwkvModel

every_shape = pytest.mark.parametrize("shape", SHAPES)

# The names on the Hub and their shapes: V vocabulary, C hidden, A attention, F intermediate.
OUTSIDE = {
    "rwkv.embeddings.weight": "V C",
    "rwkv.ln_out.weight": "C",
    "rwkv.ln_out.bias": "C",
    "head.weight": "V C",
}
FIRST = {"pre_ln.weight": "C", "pre_ln.bias": "C"}
BLOCK = {
    "ln1.weight": "C",
    "ln1.bias": "C",
    "ln2.weight": "C",
    "ln2.bias": "C",
    "attention.time_decay": "A",
    "attention.time_first": "A",
    "attention.time_mix_key": "1 1 C",
    "attention.time_mix_value": "1 1 C",
    "attention.time_mix_receptance": "1 1 C",
    "attention.key.weight": "A C",
    "attention.value.weight": "A C",
    "attention.receptance.weight": "A C",
    "attention.output.weight": "C A",
    "feed_forward.time_mix_key": "1 1 C",
    "feed_forward.time_mix_receptance": "1 1 C",
    "feed_forward.key.weight": "F C",
    "feed_forward.receptance.weight": "C C",
    "feed_forward.value.weight": "C F",
}


def hub_shapes(config):
    size = {
        "V": config.vocab_size,
        "C": config.hidden_size,
        "A": config.attention_hidden_size,
        "F": config.intermediate_size,
        "1": 1,
    }
    names = dict(OUTSIDE)
    for n in range(config.num_hidden_layers):
        names |= {f"rwkv.blocks.{n}.{name}": shape for name, shape in (FIRST if n == 0 else {}).items()}
        names |= {f"rwkv.blocks.{n}.{name}": shape for name, shape in BLOCK.items()}
    return {name: [size[s] for s in shape.split()] for name, shape in names.items()}


def shapes_in(folder):
    shapes = {}
    for path in folder.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            shapes |= {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    return shapes


# Files


@every_shape
@pytest.mark.parametrize("shard", ["5GB", "3KB"])
def test_files_hold_the_names_of_the_hub(shape, shard, tmp_path):
    model = make(shape)
    model.save_pretrained(tmp_path, max_shard_size=shard)
    assert shapes_in(tmp_path) == hub_shapes(model.config)
    if shard == "3KB" and shape != "one channel":
        assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded, info = RwkvForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert bits(loaded) == bits(model) and not loaded.training
    assert loaded.config.to_dict() | {"_name_or_path": ""} == model.config.to_dict() | {
        "_name_or_path": "",
        "dtype": loaded.config.to_dict()["dtype"],
        "architectures": ["RwkvForCausalLM"],
    }


def test_a_torch_file_loads_too(tmp_path):
    """Some checkpoints on the Hub hold nothing else."""
    model = make()
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    assert bits(RwkvForCausalLM.from_pretrained(tmp_path)) == bits(model)


def test_the_auto_classes_are_ours(tmp_path):
    make().save_pretrained(tmp_path)
    assert type(AutoConfig.from_pretrained(tmp_path)) is RwkvConfig
    assert type(AutoConfig.for_model("rwkv")) is RwkvConfig
    assert type(AutoModelForCausalLM.from_pretrained(tmp_path)) is RwkvForCausalLM
    base = AutoModel.from_pretrained(tmp_path)
    assert type(base) is RwkvModel
    same(base(text(1, 5)).last_hidden_state, make().rwkv(text(1, 5)).last_hidden_state)
    assert type(AutoModelForCausalLM.from_config(RwkvConfig(**PLAIN))) is RwkvForCausalLM


def test_a_config_of_the_hub_is_understood(tmp_path):
    """As `RWKV/rwkv-4-169m-pile` spells it, smaller, with a size that is left to its default."""
    config = {
        "architectures": ["RwkvForCausalLM"],
        "attention_hidden_size": 24,
        "bos_token_id": 0,
        "context_length": 1024,
        "eos_token_id": 0,
        "hidden_size": 24,
        "intermediate_size": None,
        "layer_norm_epsilon": 1e-05,
        "model_type": "rwkv",
        "num_hidden_layers": 2,
        "rescale_every": 6,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        "transformers_version": "4.29.0.dev0",
        "use_cache": True,
        "vocab_size": 61,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = AutoConfig.from_pretrained(tmp_path)
    assert read.intermediate_size == 96 and read.max_position_embeddings == 1024 and read.eos_token_id == 0
    assert RwkvForCausalLM(read)(text(1, 4)).logits.shape == (1, 4, 61)


@pytest.mark.parametrize("size", ["vocab_size", "hidden_size", "num_hidden_layers", "attention_hidden_size"])
@pytest.mark.parametrize("value", [0, -1, 2.5, "12"])
def test_a_size_that_is_none_is_refused(size, value):
    with pytest.raises(ValueError, match=f"^{size} "):
        RwkvConfig(**PLAIN | {size: value})


def test_tied_embeddings_are_saved_once_and_stay_tied(tmp_path):
    model = make(tie_word_embeddings=True)
    model.save_pretrained(tmp_path)
    assert set(shapes_in(tmp_path)) == set(hub_shapes(model.config)) - {"head.weight"}
    loaded = RwkvForCausalLM.from_pretrained(tmp_path)
    assert loaded.head.weight is loaded.rwkv.embeddings.weight
    ids = text(2, 7)
    same(loaded(ids).logits, model(ids).logits)
    optimizer = torch.optim.SGD(loaded.parameters(), lr=0.01)
    before = loaded(ids, labels=ids).loss
    before.backward()
    optimizer.step()
    assert loaded(ids, labels=ids).loss < before
    assert loaded.head.weight is loaded.rwkv.embeddings.weight


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("size", [70, 50])
def test_the_vocabulary_can_be_resized(size, tied):
    model = make(tie_word_embeddings=tied)
    ids = text(2, 7, 50)
    before = model(ids).logits
    model.resize_token_embeddings(size, mean_resizing=False)
    common = min(size, 61)
    assert model.config.vocab_size == size
    assert model.get_input_embeddings().weight.shape == model.get_output_embeddings().weight.shape == (size, 24)
    agree(model(ids).logits[..., :common], before[..., :common])
    assert model(ids, labels=ids).loss.isfinite()


# Arguments and outputs


@every_shape
@torch.no_grad()
def test_hidden_states_are_the_inputs_of_the_blocks(shape):
    model = make(shape)
    ids = text(2, 7, model.config.vocab_size)
    output = model(ids, output_hidden_states=True)
    states = output.hidden_states
    assert len(states) == model.config.num_hidden_layers + 1
    same(states[0], model.get_input_embeddings()(ids))
    base = model.rwkv(ids, output_hidden_states=True)
    same(states[-1], base.last_hidden_state)
    same(base.hidden_states, states)
    same(model.head(states[-1]), output.logits)
    assert model(ids).hidden_states is None
    seen = []
    hooks = [block.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for block in model.rwkv.blocks]
    model(ids)
    same(seen, list(states[:-1]))
    for hook in hooks:
        hook.remove()
    model.config.output_hidden_states = True
    same(model(ids).hidden_states, states)


@torch.no_grad()
def test_only_the_logits_that_are_kept_are_computed():
    model = make()
    ids, mask = text(2, 9), torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    for arguments in ({}, {"attention_mask": mask}):
        logits = model(ids, **arguments).logits
        for keep in (0, 1, 4, 9):
            agree(model(ids, logits_to_keep=keep, **arguments).logits, logits[:, -keep:])
        places = torch.tensor([7, 2])
        agree(model(ids, logits_to_keep=places, **arguments).logits, logits[:, places])
    assert model(ids, logits_to_keep=1).past_key_values.get_seq_length() == 9


def test_outputs_may_be_tuples():
    model = make()
    ids = text(2, 5)
    output = model(ids, labels=ids, output_hidden_states=True)
    loss, logits, cache, hidden_states = model(ids, labels=ids, output_hidden_states=True, return_dict=False)
    same((loss, logits, hidden_states), (output.loss, output.logits, output.hidden_states))
    same(contents(cache), contents(output.past_key_values))
    same(model.rwkv(ids, return_dict=False)[0], model.rwkv(ids).last_hidden_state)
    assert len(model(ids, use_cache=False, return_dict=False)) == 1


def test_embeddings_may_be_given_instead_of_ids():
    model = make()
    ids = text(2, 9)
    embeds = model.get_input_embeddings()(ids)
    same(model(inputs_embeds=embeds).logits, model(ids).logits)
    assert not model(inputs_embeds=embeds).past_key_values.has_read(ids)


def test_a_pass_changes_no_parameter():
    """Neither forward nor backward, in training or not, in any dtype, on the way there and back."""
    for dtype in (torch.float32, torch.float16):
        model = make("narrow attention", dtype=dtype)
        before = bits(model)
        for train in (False, True, False):
            ids = text(2, 9, 77)
            model.train(train)(ids, labels=ids).loss.backward()
            model.zero_grad()
            with torch.no_grad():
                model(ids)
            model.generate(ids, max_new_tokens=3, pad_token_id=0)
        assert bits(model) == before


def test_a_second_pass_gives_the_same_bits():
    model = make("narrow attention")
    ids, mask = text(3, 40, 77), torch.ones(3, 40)
    mask[0, :20] = 0

    def run():
        output = model(ids, attention_mask=mask, labels=ids)
        grads = torch.autograd.grad(output.loss, list(model.parameters()))
        return output.logits.detach(), grads

    same(run(), run())


@every_shape
@torch.no_grad()
def test_the_future_does_not_reach_the_past(shape):
    model = make(shape)
    ids = text(2, 9, model.config.vocab_size)
    other = ids.clone()
    other[:, 5:] = (other[:, 5:] + 1) % model.config.vocab_size
    same(model(other).logits[:, :5], model(ids).logits[:, :5])


# Initialisation


@pytest.mark.parametrize("layers", [1, 2, 5])
@pytest.mark.parametrize(("hidden", "attention"), [(12, None), (9, 15), (1, 1)])
def test_initialisation_is_that_of_the_paper(layers, hidden, attention):
    config = RwkvConfig(vocab_size=50, hidden_size=hidden, attention_hidden_size=attention, num_hidden_layers=layers)
    model = RwkvForCausalLM(config)
    assert all(x.isfinite().all() for x in model.parameters())
    channels = config.attention_hidden_size
    ramp = torch.arange(hidden) / hidden
    for n, block in enumerate(model.rwkv.blocks):
        depth, shallow = (n / (layers - 1) if layers > 1 else 0.0), 1 - n / layers
        att, ffn = block.attention, block.feed_forward
        decay = [-5 + 8 * (i / max(channels - 1, 1)) ** (0.7 + 1.3 * depth) for i in range(channels)]
        agree(att.time_decay.detach(), torch.tensor(decay))
        first = [math.log(0.3) + 0.5 * ((i + 1) % 3 - 1) for i in range(channels)]
        agree(att.time_first.detach(), torch.tensor(first))
        agree(att.time_mix_key.detach()[0, 0], ramp**shallow)
        agree(att.time_mix_value.detach()[0, 0], ramp**shallow + 0.3 * depth)
        agree(att.time_mix_receptance.detach()[0, 0], ramp ** (0.5 * shallow))
        agree(ffn.time_mix_key.detach()[0, 0], ramp**shallow)
        agree(ffn.time_mix_receptance.detach()[0, 0], ramp**shallow)
        for zero in (att.key, att.receptance, att.output, ffn.receptance, ffn.value):
            assert not zero.weight.any()
        for orthogonal in (att.value, ffn.key):
            assert_orthogonal(orthogonal.weight, 1.0)
        for norm in (block.ln1, block.ln2):
            assert (norm.weight == 1).all() and not norm.bias.any()
    assert_orthogonal(model.head.weight, 0.5)
    embeddings = model.get_input_embeddings().weight
    assert embeddings.abs().max() <= 1e-4
    if hidden > 1:
        assert embeddings.abs().max() > 0.9e-4
        assert embeddings.std().item() == pytest.approx(1e-4 / math.sqrt(3), rel=0.1)


def assert_orthogonal(weight, gain):
    rows, columns = weight.shape
    small = weight.detach() @ weight.detach().T if rows <= columns else weight.detach().T @ weight.detach()
    agree(small, torch.eye(len(small)) * gain**2 * max(1, rows / columns), atol=1e-5)


@pytest.mark.parametrize("layers", [1, 12])
def test_a_new_model_predicts_every_token_alike(layers):
    """What the paper's small initial values are for: the first loss is log V."""
    model = RwkvForCausalLM(RwkvConfig(vocab_size=61, hidden_size=32, num_hidden_layers=layers))
    ids = text(4, 50)
    assert model(ids, labels=ids).loss.item() == pytest.approx(math.log(61), rel=0.05)


def test_missing_weights_are_initialised_and_the_others_kept(tmp_path):
    model = make()
    weights = {name: x for name, x in model.state_dict().items() if name != "rwkv.blocks.1.attention.time_first"}
    model.save_pretrained(tmp_path, state_dict=weights)
    loaded = RwkvForCausalLM.from_pretrained(tmp_path)
    expected = RwkvForCausalLM(model.config).rwkv.blocks[1].attention.time_first
    agree(loaded.rwkv.blocks[1].attention.time_first, expected)
    same({name: loaded.state_dict()[name] for name in weights}, weights)


# Dtypes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@torch.no_grad()
def test_a_dtype_costs_no_more_than_its_rounding(dtype, tmp_path):
    make(PLAIN, num_hidden_layers=4).save_pretrained(tmp_path)
    model = RwkvForCausalLM.from_pretrained(tmp_path, dtype=dtype)
    for name, x in model.named_parameters():
        kept = dtype != torch.float64 and name.endswith(("time_decay", "time_first"))
        assert x.dtype == (torch.float32 if kept else dtype) or dtype == torch.float64, name
    truth = make(PLAIN, num_hidden_layers=4, dtype=torch.float64)
    ids = text(2, 40)
    logits = model(ids).logits
    assert logits.dtype == dtype
    expected = truth(ids).logits
    error = (logits.double() - expected).square().mean().sqrt() / expected.std()
    assert error < 20 * max(torch.finfo(dtype).eps, 1e-9)
    cache = model(ids[:, :20]).past_key_values
    layer = cache.layers[0]
    assert layer.time_mix.dtype == layer.channel_mix.dtype == dtype
    assert layer.wkv.dtype == torch.promote_types(dtype, torch.float32)
    continued = model(ids[:, 20:], past_key_values=cache).logits
    error = (continued.double() - expected[:, 20:]).square().mean().sqrt() / expected.std()
    assert error < 20 * max(torch.finfo(dtype).eps, 1e-9)


def enormous(dtype, **changes):
    """A model whose residual stream grows beyond the range of float16 (65504) within its blocks."""
    model = make(PLAIN, num_hidden_layers=8, dtype=torch.float64, **changes)
    with torch.no_grad():
        for n, block in enumerate(model.rwkv.blocks):
            block.feed_forward.value.weight.mul_(500 * 1.9**n)
    return model.to(dtype)


@torch.no_grad()
def test_scaling_keeps_float16_in_range():
    ids = text(2, 30)
    truth = enormous(torch.float64)
    states = truth(ids, output_hidden_states=True).hidden_states
    assert max(x.abs().max() for x in states) > 2 * 65504
    expected = truth(ids).logits
    assert not enormous(torch.float16, rescale_every=0)(ids).logits.isfinite().all()
    model = enormous(torch.float16, rescale_every=1)
    before = bits(model)
    logits = model(ids).logits
    assert logits.isfinite().all() and bits(model) == before
    assert (logits.double() - expected).square().mean().sqrt() < 0.05 * expected.std()


@pytest.mark.parametrize("every", [2, 3, 6, 100])
@torch.no_grad()
def test_scaling_is_not_seen_from_outside(every):
    """It is by powers of two, and hidden states are given without it."""
    ids = text(2, 30)
    model, plain = (make(PLAIN, num_hidden_layers=7, rescale_every=n, dtype=torch.float16) for n in (every, 0))
    output, expected = model(ids, output_hidden_states=True), plain(ids, output_hidden_states=True)
    for state, other in zip(output.hidden_states, expected.hidden_states, strict=True):
        agree(state, other, rtol=2e-2, atol=2e-2)
    agree(output.logits, expected.logits, rtol=2e-2, atol=2e-2)
    first, second = (
        make(PLAIN, num_hidden_layers=7, rescale_every=n)(ids, output_hidden_states=True) for n in (every, 0)
    )
    same(first.logits, second.logits)  # other dtypes are not scaled


# Devices and compilation


def test_blocks_may_live_on_disk(tmp_path):
    """With `device_map`, as where a model is larger than a device: the same bits, padded and with caches too."""
    model = make("narrow attention")
    model.save_pretrained(tmp_path / "model")
    device_map = {"rwkv.embeddings": "cpu", "rwkv.ln_out": "cpu", "head": "cpu"}
    device_map |= {f"rwkv.blocks.{n}": "disk" if n in (1, 2, 5) else "cpu" for n in range(7)}
    options = {"device_map": device_map, "offload_folder": str(tmp_path / "offload")}
    loaded = RwkvForCausalLM.from_pretrained(tmp_path / "model", **options)
    assert loaded.rwkv.blocks[1].ln1.weight.device.type == "meta"
    ids, mask = text(2, 9, 77), torch.tensor([[0, 0, 0] + [1] * 6, [1] * 9])
    with torch.no_grad():
        same(loaded(ids).logits, model(ids).logits)
        output = loaded(ids, attention_mask=mask)
        same(output.logits, model(ids, attention_mask=mask).logits)
    options = {"max_new_tokens": 5, "attention_mask": mask, "pad_token_id": 0, "do_sample": False}
    same(loaded.generate(ids, **options), model.generate(ids, **options))


def test_device_map_auto_loads_whole_blocks(tmp_path):
    from accelerate import infer_auto_device_map

    model = make("narrow attention")
    model.save_pretrained(tmp_path)
    loaded = RwkvForCausalLM.from_pretrained(tmp_path, device_map="auto")
    same(loaded(text(2, 9, 77).to(loaded.device)).logits.cpu(), model(text(2, 9, 77)).logits)
    block = sum(x.numel() * 4 for x in model.rwkv.blocks[1].parameters())
    placed = infer_auto_device_map(
        model, max_memory={"cpu": 3 * block, "disk": 10**9}, no_split_module_classes=model._no_split_modules
    )
    assert set(placed.values()) == {"cpu", "disk"}
    assert not any("rwkv.blocks." in name and name.count(".") > 2 for name in placed)


def test_a_model_may_be_built_without_memory():
    with torch.device("meta"):
        model = RwkvForCausalLM(RwkvConfig(hidden_size=5120, num_hidden_layers=40))
        output = model(torch.zeros(2, 100, dtype=torch.long))
    assert 14.0e9 < model.num_parameters() < 14.3e9
    assert output.logits.shape == (2, 100, 50277) and output.logits.device.type == "meta"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_dense_forward_compiles_whole(dtype):
    torch._dynamo.reset()
    model = make("wide attention", dtype=dtype)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    tolerance = {} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    ids = text(2, 9, 53)
    agree(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, **tolerance)
    agree(compiled(ids, labels=ids, use_cache=False).loss, model(ids, labels=ids, use_cache=False).loss, **tolerance)
    with torch.no_grad():
        agree(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits, **tolerance)


def test_gradients_of_the_compiled_model_are_those_of_the_model():
    torch._dynamo.reset()
    model = make("wide attention").train()
    ids = text(2, 9, 53)
    parameters = list(model.parameters())
    expected = torch.autograd.grad(model(ids, labels=ids).loss, parameters)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    agree(torch.autograd.grad(compiled(ids, labels=ids).loss, parameters), expected)


@torch.no_grad()
def test_a_step_from_a_cache_compiles_whole():
    torch._dynamo.reset()
    model = make("wide attention")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    ids = text(2, 12, 53)
    whole = model(ids).logits
    cache = model(ids[:, :9]).past_key_values
    for t in range(9, 12):
        output = compiled(ids[:, t : t + 1], past_key_values=cache)
        cache = output.past_key_values
        agree(output.logits[:, 0], whole[:, t])
    assert cache.get_seq_length() == 12 and cache.has_read(ids)


def test_a_base_model_takes_the_weights_of_the_whole(tmp_path):
    base = RwkvModel(RwkvConfig(**PLAIN))
    randomise(base)
    base.save_pretrained(tmp_path)
    loaded = RwkvForCausalLM.from_pretrained(tmp_path)
    ids = text(1, 5)
    same(loaded.rwkv(ids).last_hidden_state, base.eval()(ids).last_hidden_state)
