"""Laws of training in chunks: the loss and the gradients of the whole, or of the whole with its history cut."""

import gc
from pathlib import Path

import pytest
import torch
from models import agree, gradients, make, padded, text
from peft import LoraConfig, get_peft_model
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

LENGTHS = (5, 1, 12, 7, 1, 9)


def packed():
    """Sequences end to end in two rows, and labels of which some do not count."""
    ids = text(2, 17, 61)
    positions = torch.cat([torch.arange(n) for n in (5, 1, 11, 7, 1, 9)]).view(2, 17)
    return {"input_ids": ids, "position_ids": positions, "labels": ids.masked_fill(ids % 5 == 0, -100)}


def with_padding():
    ids, mask = padded([text(1, n)[0] for n in LENGTHS], "left")
    mask[2, 6] = 0
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def rows():
    ids = text(3, 14, 61)
    return {"input_ids": ids, "labels": ids}


def one_flattened_row():
    ids = text(1, sum(LENGTHS), 61)
    bounds = torch.tensor([0, *LENGTHS]).cumsum(0)
    return {"input_ids": ids, "cu_seq_lens_q": bounds, "labels": ids}


def same_gradients(model, loss, other):
    found = []
    for one in (loss, other):
        one.backward()
        found.append(gradients(model))
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient, rtol=1e-9, atol=1e-12, msg=name)


batches = pytest.mark.parametrize("batch", [rows, with_padding, packed, one_flattened_row])


@batches
@pytest.mark.parametrize("chunk_length", [1, 3, 7, 14, 100])
@pytest.mark.parametrize("initial_state", [False, True])
def test_chunks_have_the_gradients_of_the_whole(batch, chunk_length, initial_state):
    model = make(dtype=torch.float64)
    if initial_state:
        model.set_initial_state(model(text(1, 4, 61)).past_key_values.detach())
        model.double()
    inputs = batch()
    whole = model(**inputs).loss
    chunked = model(**inputs, chunk_length=chunk_length)
    assert chunked.logits is None
    agree(chunked.loss, whole)
    same_gradients(model, chunked.loss, whole)


@pytest.mark.parametrize("chunk_length", [1, 5, 13])
def test_without_carried_gradients_the_state_is_a_constant(chunk_length):
    model = make(dtype=torch.float64)
    ids = text(1, 17, 61)
    chunked = model(ids, labels=ids, chunk_length=chunk_length, carry_gradients=False).loss
    agree(chunked, model(ids, labels=ids).loss)
    cache, losses = None, []
    for begin in range(0, 17, chunk_length):
        part = ids[:, begin : begin + chunk_length + 1]  # with the token that its last one is to predict
        read = part[:, :chunk_length]
        output = model(read, past_key_values=cache, use_cache=True)
        cache = output.past_key_values.detach()
        targets = part[0, 1:]
        losses.append(-output.logits[0, : len(targets)].float().log_softmax(-1).gather(1, targets[:, None]).sum() / 16)
    same_gradients(model, chunked, torch.stack(losses).sum())


def test_the_loss_is_divided_by_the_items_of_the_whole_batch():
    model = make()
    ids = text(1, 9, 61)
    agree(model(ids, labels=ids, chunk_length=4, num_items_in_batch=16).loss, model(ids, labels=ids).loss / 2)


def test_dropout_of_adapters_is_the_same_when_a_chunk_is_computed_again():
    """Else the gradients would be of another function than the loss."""
    config = LoraConfig(target_modules=["key", "value"], lora_dropout=0.5, init_lora_weights=False)
    model = get_peft_model(make(dtype=torch.float64), config).double().train()
    ids = text(1, 9, 61)
    weight = next(p for name, p in model.named_parameters() if "lora_B" in name)

    def loss():
        torch.manual_seed(0)
        return model(input_ids=ids, labels=ids, chunk_length=4).loss

    slope = torch.autograd.grad(loss(), weight)[0]
    steepest = slope / slope.norm()  # along any other way the slope may be next to nothing
    step = 1e-2
    with torch.no_grad():
        weight += step * steepest
        above = loss().item()
        weight -= 2 * step * steepest
        assert (above - loss().item()) / (2 * step) == pytest.approx(slope.norm().item(), rel=1e-2)


def adapted():
    config = LoraConfig(target_modules=["key", "value", "head"], lora_dropout=0.5, init_lora_weights=False)
    return get_peft_model(make(), config).double().train()


def only_an_initial_state():
    model = make().requires_grad_(False)
    model.set_initial_state(model(text(1, 4, 61)).past_key_values)
    model.rwkv.initial_state.requires_grad_()
    return model.double()


def checkpointed(use_reentrant):
    model = make(dtype=torch.float64, tie_word_embeddings=True).train()
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    return model


MODELS = {
    "dropout": adapted,
    "initial state": only_an_initial_state,
    "checkpointed": lambda: checkpointed(False),
    "checkpointed by reentry": lambda: checkpointed(True),
}


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("carry", [True, False])
def test_one_graph_of_all_chunks_has_the_same_gradients(kind, carry):
    """As it is made where parameters are in parts. And the random numbers after it are the same."""
    model, batch = MODELS[kind](), packed()
    found = []
    for in_parts in (False, True):
        if in_parts:
            next(p for p in model.parameters() if p.requires_grad).ds_id = 0
        embeds = model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        torch.manual_seed(0)
        loss = model(**batch | {"input_ids": None}, inputs_embeds=embeds, chunk_length=4, carry_gradients=carry).loss
        (2 * loss).backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        found.append((loss.detach(), grads | {"embeds": embeds.grad, "next": torch.rand(3, dtype=torch.float64)}))
        model.zero_grad(set_to_none=True)
    assert len(found[0][1]) > 2
    torch.testing.assert_close(*found, rtol=1e-9, atol=1e-12)


def test_autocast_is_as_it_was_when_a_chunk_is_computed_again():
    model, ids = make(), text(1, 23, 61)
    found = []
    for how in ({"skip_logits": True}, {"chunk_length": 23}):
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(ids, labels=ids, **how).loss
        loss.backward()
        found.append(gradients(model))
    torch.testing.assert_close(*found, rtol=1e-5, atol=1e-7)


def test_hooks_of_parameters_see_the_whole_gradient_once():
    model, ids = make(dtype=torch.float64), text(1, 23, 61)
    weight = model.rwkv.blocks[1].attention.key.weight
    (whole,) = torch.autograd.grad(model(ids, labels=ids).loss, weight)
    seen = []
    weight.register_hook(lambda grad: seen.append(grad) or grad / 2)
    weight.register_post_accumulate_grad_hook(lambda weight: seen.append(weight.grad.clone()))
    for _ in range(2):  # accumulated
        model(ids, labels=ids, chunk_length=4).loss.backward()
    torch.testing.assert_close(seen, [whole, whole / 2, whole, whole], rtol=1e-9, atol=1e-12)


def nodes(tensor):
    """The number of nodes of the graph that autograd keeps for a tensor."""
    seen, todo = set(), [tensor.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [following for following, _ in node.next_functions]
    return len(seen)


def kept_bytes():
    gc.collect()
    tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]
    return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}.values())


@pytest.mark.parametrize("carry", [True, False])
def test_a_chunk_leaves_its_state_and_nothing_else(carry):
    model = make()
    state = 3 * 5 * 24 * 4 if carry else 0  # layers x (two inputs and a, b, p) x channels x bytes
    found = []
    for chunks in (3, 30):
        ids = text(1, 4 * chunks, 61)
        before = kept_bytes()
        loss = model(ids, labels=ids, chunk_length=4, carry_gradients=carry).loss
        kept = kept_bytes() - before - chunks * (4 * 3 * 8 + 2 * 8)  # less ids, labels, and where sequences begin
        found.append((nodes(loss), kept))
    assert found[0][0] == found[1][0]
    assert (found[1][1] - found[0][1]) / 27 <= state + (torch.get_rng_state().nbytes if carry else 0)


def learn(rank, folder):
    """One of two processes, which has one of two rows, in DDP, and then in FSDP2."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2)
    ids = text(2, 23, 61)[rank : rank + 1]
    model = make(dtype=torch.float64)
    parallel = DistributedDataParallel(model)
    found = []
    for carry in (True, False):
        parallel(ids, labels=ids, chunk_length=4, carry_gradients=carry).loss.backward()
        found.append(gradients(model))
    del parallel
    mesh = init_device_mesh("cpu", (2,))
    for module in (*model.rwkv.blocks, model):
        fully_shard(module, mesh=mesh)
    for carry in (True, False):
        model(ids, labels=ids, chunk_length=4, carry_gradients=carry).loss.backward()
        found.append({name: gradient.full_tensor() for name, gradient in gradients(model).items()})
    if rank == 0:
        torch.save(found, folder / "found.pt")
    torch.distributed.destroy_process_group()


def test_two_processes_learn_like_one(tmp_path: Path):
    torch.multiprocessing.spawn(learn, (tmp_path,), nprocs=2)
    model, ids = make(dtype=torch.float64), text(2, 23, 61)
    expected = []
    for carry in (True, False):
        sum(model(row, labels=row, chunk_length=4, carry_gradients=carry).loss / 2 for row in ids.split(1)).backward()
        expected.append(gradients(model))
    found = torch.load(tmp_path / "found.pt", weights_only=True)
    torch.testing.assert_close(found, [*expected, *expected], rtol=1e-9, atol=1e-12)


def test_blocks_run_once_more_for_the_gradients():
    model, ids = make(), text(1, 23, 61)
    calls = []

    def count(block, inputs, output):
        calls.append(inputs[0].shape[1])

    for block in model.rwkv.blocks:
        block.register_forward_hook(count)
    loss = model(ids, labels=ids, chunk_length=9).loss
    assert calls == [9] * 3 + [9] * 3 + [5] * 3
    loss.backward()
    assert sorted(calls) == sorted(2 * ([9] * 3 + [9] * 3 + [5] * 3))


def test_a_batch_of_nothing_is_that_of_the_whole():
    model, ids = make(), text(2, 5, 61)
    batch = {"input_ids": ids, "attention_mask": torch.zeros_like(ids), "labels": torch.full_like(ids, -100)}
    losses = [model(**batch, num_items_in_batch=3, **how).loss for how in ({}, {"chunk_length": 2})]
    assert losses[0].item() == losses[1].item() == 0
    losses[1].backward()  # of processes that train together, one may have such a batch
    assert model.head.weight.grad is not None


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"chunk_length": 0}, "chunk_length is 0"),
        ({"chunk_length": 2.0}, "chunk_length is 2.0"),
        ({"labels": None}, "without labels"),
        ({"labels": torch.zeros(1, 11, dtype=torch.long)}, r"labels have shape \(1, 11\), the tokens \(1, 9\)"),
        ({"past_key_values": "some"}, "leave out past_key_values"),
        ({"use_cache": True, "logits_to_keep": 1}, "leave out use_cache, logits_to_keep"),
    ],
)
def test_what_cannot_be_read_in_chunks_is_refused(changes, complaint):
    model = make()
    ids = text(1, 9, 61)
    if "past_key_values" in changes:
        changes = {"past_key_values": model(ids).past_key_values}
    with pytest.raises(ValueError, match=complaint):
        model(**{"input_ids": ids, "labels": ids, "chunk_length": 4} | changes)
