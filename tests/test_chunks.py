"""Laws of training in chunks: the loss and the gradients of the whole, or of the whole with its history cut."""

import pytest
import torch
from models import agree, gradients, make, padded, text
from peft import LoraConfig, get_peft_model

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

    slope = torch.autograd.grad(loss(), weight)[0].sum().item()
    step = 1e-2
    with torch.no_grad():
        weight += step
        above = loss().item()
        weight -= 2 * step
        assert (above - loss().item()) / (2 * step) == pytest.approx(slope, rel=1e-2)


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
