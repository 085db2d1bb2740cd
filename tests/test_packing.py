"""Padding, packing and continuing are one thing: a sequence gives what it gives alone, wherever it lies."""

import itertools

import pytest
import torch
from models import SHAPES, agree, contents, gradients, make, padded, row_of, same, text
from transformers import DataCollatorWithFlattening

from modeling_rwkv.packing import Packed, Rows, arrange

every_shape = pytest.mark.parametrize("shape", [name for name in SHAPES if name != "one channel"])

# Which of T positions of a row hold tokens.
MASKS = {
    "left": [[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 1]],
    "right": [[1, 1, 0, 0, 0, 0, 0], [1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 0, 0]],
    "holes": [[1, 0, 1, 1, 0, 0, 1], [0, 1, 0, 1, 0, 1, 0], [1, 1, 1, 1, 1, 1, 0]],
    "rows of padding": [[0, 0, 0, 0, 0, 0, 0], [0, 1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 0, 0]],
    "padding only": [[0] * 7] * 3,
    "none": [[1] * 7] * 3,
}
every_mask = pytest.mark.parametrize("mask", MASKS)


def read_alone(model, row, past=None):
    """The logits (n, V) of a row's tokens (n,), and the cache after them."""
    if len(row) == 0:
        return torch.zeros(0, model.config.vocab_size), past
    output = model(row[None], past_key_values=past, use_cache=True)
    return output.logits[0], output.past_key_values


@every_shape
@every_mask
@pytest.mark.parametrize("continuing", [False, True], ids=["fresh", "continuing"])
def test_a_padded_row_is_the_row_alone(shape, mask, continuing):
    model = make(shape)
    mask = torch.tensor(MASKS[mask])
    ids = text(3, 7, model.config.vocab_size)
    past = model(text(3, 4, model.config.vocab_size), use_cache=True).past_key_values if continuing else None
    output = model(ids, attention_mask=mask, past_key_values=past, use_cache=True)
    for i, valid in enumerate(mask.bool()):
        logits, cache = read_alone(model, ids[i][valid], None if past is None else row_of(past, i))
        agree(output.logits[i][valid], logits)
        if cache is None:
            assert not any(part[i, ..., :2, :].any() for part in (x.wkv for x in output.past_key_values.layers))
        else:
            agree(contents(row_of(output.past_key_values, i)), contents(cache))
    assert not model.rwkv(ids, attention_mask=mask, past_key_values=past).last_hidden_state[mask == 0].any()


@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_batch_has_the_gradients_of_its_rows(side):
    model = make("wide attention")
    rows = [text(1, n, 53)[0] for n in (1, 4, 9)]
    ids, mask = padded(rows, side)
    labels = ids.masked_fill(mask == 0, -100)
    loss = model(ids, attention_mask=mask, labels=labels, num_items_in_batch=11).loss
    loss.backward()
    together = gradients(model)
    losses = [model(row[None], labels=row[None], num_items_in_batch=11).loss for row in rows[1:]]
    sum(losses).backward()
    agree(loss, sum(losses))
    agree(together, gradients(model))


@every_mask
def test_what_stands_at_padding_does_not_matter(mask):
    model = make()
    mask = torch.tensor(MASKS[mask])
    ids = text(3, 7)
    embeds = model.get_input_embeddings()(ids).detach()
    wild = torch.where(mask[..., None] == 0, torch.nan, embeds).requires_grad_()
    expected = model(inputs_embeds=embeds, attention_mask=mask)
    output = model(inputs_embeds=wild, attention_mask=mask)
    same(output.logits, expected.logits)
    same([part for layer in output.past_key_values.layers for part in layer], flat(expected.past_key_values))
    output.logits.square().sum().backward()
    assert not wild.grad[mask == 0].any() and wild.grad.isfinite().all()
    other = torch.where(mask == 0, 60 - ids, ids)
    same(model(other, attention_mask=mask).logits, model(ids, attention_mask=mask).logits)


def flat(cache):
    return [part for layer in cache.layers for part in layer]


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64, torch.float32, torch.float16])
@torch.no_grad()
def test_a_mask_may_have_any_dtype(dtype):
    model = make()
    ids, mask = text(3, 7), torch.tensor(MASKS["holes"])
    same(model(ids, attention_mask=mask.to(dtype)).logits, model(ids, attention_mask=mask).logits)


@torch.no_grad()
def test_a_mask_may_cover_the_past_too():
    model = make()
    ids, mask = text(3, 7), torch.tensor(MASKS["left"])
    for split in range(1, 7):
        first = model(ids[:, :split], attention_mask=mask[:, :split])
        for given in (mask, mask[:, split:]):
            past = first.past_key_values.clone()
            second = model(ids[:, split:], attention_mask=given, past_key_values=past)
            logits = torch.cat([first.logits, second.logits], dim=1)
            agree(logits[mask == 1], model(ids, attention_mask=mask).logits[mask == 1])
            agree(contents(past)[::3], contents(model(ids, attention_mask=mask).past_key_values)[::3])


def test_no_padding_needs_no_layout():
    """All ones, and positions that only rise, take the path of no mask at all."""
    ones, rising = torch.ones(2, 5), torch.arange(3, 8)[None]
    for arguments in ({}, {"attention_mask": ones}, {"position_ids": rising}, {"seq_idx": torch.zeros(2, 5)}):
        layout, valid = arrange((2, 5), **arguments)
        assert isinstance(layout, Rows) and valid is None
    assert isinstance(arrange((2, 5), torch.tensor([[0, 1, 1, 1, 1], [1] * 5]))[0], Packed)


# Packing


LENGTHS = (4, 1, 7, 1, 1, 3)


def packed_arguments(lengths):
    """How transformers spells that sequences of these lengths lie in one row."""
    bounds = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    numbers = torch.cat([torch.full((n,), i) for i, n in enumerate(lengths)])[None]
    return {
        "position_ids": {"position_ids": positions},
        "position_ids from 2": {"position_ids": positions + 2},
        "cu_seq_lens_q": {"cu_seq_lens_q": bounds},
        "cu_seq_lens_k": {"cu_seq_lens_k": bounds.long()},
        "both": {"cu_seq_lens_q": bounds, "cu_seq_lens_k": bounds, "max_length_q": 7, "max_length_k": 7},
        "seq_idx": {"seq_idx": numbers.int()},
        "all": {"cu_seq_lens_q": bounds, "position_ids": positions, "seq_idx": numbers},
    }


@pytest.mark.parametrize("spelling", packed_arguments(LENGTHS))
@every_shape
def test_a_packed_sequence_is_the_sequence_alone(spelling, shape):
    model = make(shape)
    rows = [text(1, n, model.config.vocab_size, seed=i)[0] for i, n in enumerate(LENGTHS)]
    ids = torch.cat(rows)[None]
    output = model(ids, use_cache=True, **packed_arguments(LENGTHS)[spelling])
    alone = [read_alone(model, row) for row in rows]
    agree(output.logits[0], torch.cat([logits for logits, _ in alone]))
    agree(contents(output.past_key_values), contents(alone[-1][1]))


@torch.no_grad()
def test_only_the_first_packed_sequence_continues_the_cache():
    model = make()
    past = model(text(1, 5)).past_key_values
    ids = text(1, 9)
    output = model(ids, past_key_values=past.clone(), cu_seq_lens_q=torch.tensor([0, 3, 9]))
    agree(output.logits[0, :3], model(ids[:, :3], past_key_values=past.clone()).logits[0])
    agree(output.logits[0, 3:], model(ids[:, 3:]).logits[0])


@torch.no_grad()
def test_bounds_may_hold_sequences_of_no_tokens():
    model = make()
    ids = text(1, 5)
    expected = model(ids, cu_seq_lens_q=torch.tensor([0, 2, 5])).logits
    same(model(ids, cu_seq_lens_q=torch.tensor([0, 0, 2, 2, 5, 5])).logits, expected)


@torch.no_grad()
def test_one_token_may_have_any_position():
    model = make()
    past = model(text(2, 5)).past_key_values
    ids = text(2, 1)
    expected = model(ids, past_key_values=past.clone()).logits
    for position in (0, 5):
        at = torch.full((2, 1), position)
        same(model(ids, past_key_values=past.clone(), position_ids=at).logits, expected)


@pytest.mark.parametrize(
    "options", [{}, {"return_flash_attn_kwargs": True}, {"return_seq_idx": True}, {"return_position_ids": True}]
)
def test_batches_of_the_flattening_collator_train_like_separate_rows(options):
    model = make("wide attention").train()
    rows = [text(1, n, 53, seed=n)[0] for n in (5, 2, 8)]
    batch = DataCollatorWithFlattening(**options)([{"input_ids": row.tolist()} for row in rows])
    loss = model(**batch, num_items_in_batch=12).loss
    loss.backward()
    together = gradients(model)
    losses = [model(row[None], labels=row[None], num_items_in_batch=12).loss for row in rows]
    sum(losses).backward()
    agree(loss, sum(losses))
    agree(together, gradients(model))


def test_padding_and_packing_combine():
    """Two rows, each of several sequences with padding between, before and inside them, continuing two caches."""
    model = make("narrow attention")
    mask = torch.tensor([[0, 1, 1, 0, 1, 1, 1, 0], [1, 0, 1, 1, 0, 0, 1, 1]])
    numbers = torch.tensor([[0, 0, 0, 0, 1, 1, 2, 2], [0, 0, 0, 1, 1, 2, 2, 2]])
    positions = torch.tensor([[9, 10, 11, 12, 0, 1, 0, 1], [5, 6, 7, 0, 1, 2, 0, 1]])
    sequences = [[[1, 2], [4, 5], [6]], [[0, 2], [3], [6, 7]]]
    ids = text(2, 8, 77)
    past = model(text(2, 3, 77), use_cache=True).past_key_values
    for spelling in ({"seq_idx": numbers}, {"position_ids": positions}):
        output = model(ids, attention_mask=mask, past_key_values=past, use_cache=True, **spelling)
        for i, row in enumerate(sequences):
            cache = row_of(past, i)
            for places in row:
                logits, cache = read_alone(model, ids[i, places], cache)
                agree(output.logits[i, places], logits)
                last, cache = cache, None
            agree(contents(row_of(output.past_key_values, i)), contents(last))


REFUSED = {
    "mask of too few rows": ("attention_mask", {"attention_mask": torch.ones(1, 5)}),
    "mask too short": ("attention_mask", {"attention_mask": torch.ones(2, 4)}),
    "mask of four dimensions": ("attention_mask", {"attention_mask": torch.ones(2, 1, 5, 5)}),
    "positions of too many rows": ("position_ids", {"position_ids": torch.arange(5).expand(3, 5)}),
    "positions too long": ("position_ids", {"position_ids": torch.arange(6)[None]}),
    "positions of one dimension": ("position_ids", {"position_ids": torch.arange(5)}),
    "seq_idx too short": ("seq_idx", {"seq_idx": torch.zeros(2, 4)}),
    "bounds for two rows": ("cu_seq_lens", {"cu_seq_lens_q": torch.tensor([0, 5])}),
}
REFUSED_OF_ONE_ROW = {
    "bounds end early": ("cu_seq_lens", {"cu_seq_lens_q": torch.tensor([0, 4])}),
    "bounds start late": ("cu_seq_lens", {"cu_seq_lens_q": torch.tensor([1, 6])}),
    "bounds go back": ("cu_seq_lens", {"cu_seq_lens_k": torch.tensor([0, 4, 3, 5])}),
    "bounds of two dimensions": ("cu_seq_lens", {"cu_seq_lens_q": torch.tensor([[0, 5]])}),
    "bounds of one number": ("cu_seq_lens", {"cu_seq_lens_q": torch.tensor([0])}),
}


@pytest.mark.parametrize(
    ("rows", "name", "arguments"),
    [(2, *case) for case in REFUSED.values()] + [(1, *case) for case in REFUSED_OF_ONE_ROW.values()],
    ids=[*REFUSED, *REFUSED_OF_ONE_ROW],
)
def test_what_does_not_fit_is_refused_by_name(rows, name, arguments):
    with pytest.raises(ValueError, match=rf"^{name}"):
        make()(text(rows, 5), **arguments)


def test_no_tokens_are_refused():
    with pytest.raises(ValueError, match="no tokens"):
        make()(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        make()()
    with pytest.raises(ValueError, match="either input_ids or inputs_embeds"):
        make()(text(1, 2), inputs_embeds=torch.zeros(1, 2, 24))


@pytest.mark.parametrize("mask", ["left", "right", "holes", "none"])
@pytest.mark.parametrize("packed", [False, True], ids=["whole rows", "packed rows"])
def test_the_loss_is_that_of_each_sequence_alone(mask, packed):
    """With labels equal to the ids: no first token is scored, and a token behind padding is, by the one before it."""
    model = make()
    mask = torch.tensor(MASKS[mask])
    ids = text(3, 7)
    valid = mask.bool()
    restarts = torch.tensor([[0, 1, 2, 3, 0, 1, 2]]).expand(3, 7)
    second = torch.arange(7) >= 4
    parts = [valid & ~second, valid & second] if packed else [valid]
    labels = ids.masked_fill(~valid, -100)
    output = model(
        ids, attention_mask=mask, position_ids=restarts if packed else None, labels=labels, num_items_in_batch=1
    )
    alone = 0.0
    for part in parts:
        for row, kept in zip(ids, part, strict=True):
            if kept.sum() > 1:
                alone += model(row[kept][None], labels=row[kept][None], num_items_in_batch=1).loss
    agree(output.loss, alone)
