"""Laws of long prompts: in pieces they are what they are at once, in the memory of a piece."""

import copy

import pytest
import torch
from models import contents, make, padded, same, text

from modeling_rwkv import RwkvCache
from modeling_rwkv.modeling_rwkv import RwkvBlock

EXACT = {"rtol": 1e-12, "atol": 1e-12}  # float64, summed in another order
LENGTHS = (3, 50, 21)
ONE_PASS = None


@pytest.fixture(name="seen")
def shapes_that_blocks_see(monkeypatch):
    """(rows, positions) of what every block was given. Not by a hook, which would end it."""
    seen = []
    forward = RwkvBlock.forward

    def recorded(self, x, *args, **kwargs):
        seen.append(tuple(x.shape[:2]))
        return forward(self, x, *args, **kwargs)

    monkeypatch.setattr(RwkvBlock, "forward", recorded)
    return seen


def double(most, initial=False, **changes):
    model = make("wide attention", vocab_size=61, dtype=torch.float64, **changes)
    with torch.no_grad():
        if initial:
            model.set_initial_state(model(text(1, 9)).past_key_values)
    model.prefill_tokens = most
    return model


def prompts(padding):
    """Three rows of 50 positions and their mask, None where all are text."""
    ids, mask = padded([text(1, n)[0] for n in LENGTHS], "right" if padding == "right" else "left")
    if padding == "none":
        return text(3, 50), None
    if padding == "holes":
        mask[1, 7:30] = 0
    elif padding == "columns":  # whole pieces of it
        mask[:, :13] = mask[:, 20:34] = mask[:, 48:] = 0
    return ids, mask


def agree(actual, expected):
    """The outputs of two calls."""
    torch.testing.assert_close(actual.logits, expected.logits, **EXACT)
    agree_on_state(actual.past_key_values, expected.past_key_values)


def agree_on_state(actual, expected):
    assert actual.seen_tokens == expected.seen_tokens
    assert actual.fingerprint is expected.fingerprint is None or torch.equal(actual.fingerprint, expected.fingerprint)
    torch.testing.assert_close(contents(actual), contents(expected), **EXACT)


@pytest.mark.parametrize("padding", ["none", "left", "right", "holes", "columns"])
@pytest.mark.parametrize("most", [2, 9, 40, 149])
@pytest.mark.parametrize("initial", [False, True], ids=["empty", "initial state"])
@torch.no_grad()
def test_pieces_are_the_whole(padding, most, initial, seen):
    ids, mask = prompts(padding)
    parted, whole = double(most, initial), double(ONE_PASS, initial)
    for keep in (1, 11):
        options = {"attention_mask": mask, "logits_to_keep": keep}
        agree(parted(ids, **options), whole(ids, **options))
    embeds = whole.rwkv.embeddings(ids)
    agree(parted(inputs_embeds=embeds, **options), whole(inputs_embeds=embeds, **options))
    past = whole(text(3, 4)).past_key_values
    longer = None if mask is None else torch.cat([torch.ones(3, 4), mask], dim=1)
    for given in (mask, longer):
        options = {"attention_mask": given, "logits_to_keep": 1}
        agree(
            parted(ids, past_key_values=past.clone(), **options), whole(ids, past_key_values=past.clone(), **options)
        )


@pytest.mark.parametrize(("rows", "most"), [(1, 1), (1, 7), (1, 26), (3, 7), (3, 75), (5, 4)])
@pytest.mark.parametrize("keep", [1, 8])
@torch.no_grad()
def test_blocks_never_see_more_than_a_piece(rows, most, keep, seen):
    """And pieces are of equal length; but the last is as long as what is asked of it."""
    ids = text(rows, 53)
    double(most)(ids, logits_to_keep=keep)
    assert all(row == rows for row, _ in seen)
    *lengths, last = [length for _, length in seen[:: double(most).config.num_hidden_layers]]
    assert len(lengths) > 0 and sum(lengths) + last == 53
    bound = max(1, most // rows)
    assert set(lengths) == {lengths[0]} and bound / 2 < lengths[0] <= bound
    assert keep <= last < lengths[0] + keep and (keep > 1 or lengths[0] - last <= len(lengths))


@torch.no_grad()
def test_pieces_of_nothing_but_padding_are_left_out(seen):
    ids, mask = text(3, 50), torch.ones(3, 50)
    mask[:, :25] = mask[:2, 25:40] = 0
    options = {"attention_mask": mask, "logits_to_keep": 1}
    agree(double(30)(ids, **options), double(ONE_PASS)(ids, **options))
    assert (1, 0) not in seen and (1, 10) in seen


@pytest.mark.parametrize(("rows", "length"), [(1, 40), (4, 10), (40, 1), (7, 5)])
@torch.no_grad()
def test_what_fits_is_read_in_one_pass(rows, length, seen):
    ids = text(rows, length)
    same(double(40)(ids, logits_to_keep=1).logits, double(ONE_PASS)(ids, logits_to_keep=1).logits)
    assert set(seen) == {(rows, length)}


# Who looks at more than the last positions gets one pass


def positions(*lengths):
    return torch.cat([torch.arange(n) for n in lengths])[None]


LOOKS = {
    "all logits": {"logits_to_keep": 0},
    "logits by index": {"logits_to_keep": torch.tensor([3, 49])},
    "labels": {"logits_to_keep": 0, "labels": text(1, 50)},
    "hidden states": {"output_hidden_states": True},
    "positions that restart": {"position_ids": positions(20, 30)},
    "positions that restart where a piece begins": {"position_ids": positions(10, 40)},
    "lengths": {"cu_seq_lens_q": torch.tensor([0, 20, 50])},
    "numbers of sequences": {"seq_idx": torch.arange(50)[None] // 30},
}


@pytest.mark.parametrize("look", LOOKS)
@torch.no_grad()
def test_who_looks_at_more_gets_one_pass(look, seen):
    options = {"logits_to_keep": 1} | LOOKS[look]
    same(double(10)(text(1, 50), **options).logits, double(ONE_PASS)(text(1, 50), **options).logits)
    assert set(seen) == {(1, 50)}


@torch.no_grad()
def test_hidden_states_may_be_asked_for_in_the_config(seen):
    outputs = double(10, output_hidden_states=True)(text(1, 50), logits_to_keep=1)
    assert outputs.hidden_states[0].shape[1] == 50 and set(seen) == {(1, 50)}


def test_autograd_gets_one_pass(seen):
    double(10)(text(1, 50), logits_to_keep=1).logits.sum().backward()
    assert set(seen) == {(1, 50)}


@pytest.mark.parametrize("place", ["rwkv", "rwkv.blocks.1.attention.key", "rwkv.ln_out"])
@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook"])
@torch.no_grad()
def test_hooks_see_the_whole(place, kind, seen):
    model, calls = double(10), []
    getattr(model.get_submodule(place), f"register_{kind}")(lambda *_: calls.append(None))
    model(text(1, 50), logits_to_keep=1)
    assert set(seen) == {(1, 50)} and len(calls) == 1


@torch.no_grad()
def test_compiled_it_is_one_graph():
    model = double(10)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    agree(compiled(text(1, 50), logits_to_keep=1), model(text(1, 50), logits_to_keep=1))


# The cache that is given


@torch.no_grad()
def test_the_cache_that_is_given_goes_on():
    model, past = double(10), RwkvCache()
    first = model(text(1, 50), past_key_values=past, logits_to_keep=1, return_dict=False)[1]
    again = model(text(1, 40), past_key_values=past, logits_to_keep=1).past_key_values
    assert first is again is past and past.seen_tokens == 90
    assert past.has_read(torch.cat([text(1, 50), text(1, 40)], dim=1))


@torch.no_grad()
def test_the_cache_that_is_given_stays_where_it_is_not_to_be_used():
    model = double(10)
    past = model(text(1, 5)).past_key_values
    before, expected = past.clone(), double(ONE_PASS)(text(1, 50), past_key_values=past.clone(), logits_to_keep=1)
    outputs = model(text(1, 50), past_key_values=past, use_cache=False, logits_to_keep=1)
    assert outputs.past_key_values is None
    torch.testing.assert_close(outputs.logits, expected.logits, **EXACT)
    same(contents(past), contents(before))
    assert past.seen_tokens == 5


@torch.no_grad()
def test_what_breaks_off_leaves_the_cache_as_it_was(seen, monkeypatch):
    model = double(10)
    past = model(text(1, 5)).past_key_values
    before, forward = copy.deepcopy(past), RwkvBlock.forward

    def interrupted(*args, **kwargs):
        if len(seen) > 8:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(RwkvBlock, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model(text(1, 50), past_key_values=past, logits_to_keep=1)
    assert len(seen) > 8 and past.seen_tokens == 5
    same(past.fingerprint, before.fingerprint)
    same(contents(past), contents(before))


# Generation


@pytest.mark.parametrize("most", [1, 16, 100])
@pytest.mark.parametrize(
    "options",
    [{}, {"use_cache": False}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}],
    ids=["greedy", "no cache", "beams", "several"],
)
def test_generation_writes_the_same(most, options, seen):
    ids, mask = prompts("left")
    options |= {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    expected = double(ONE_PASS).generate(ids, **options)
    seen.clear()
    same(double(most).generate(ids, **options), expected)
    assert {rows * length for rows, length in seen if length > 1} <= set(range(max(most, 13)))
    embeds = double(1).rwkv.embeddings(ids).detach()
    same(double(most).generate(inputs_embeds=embeds, **options), expected[:, ids.shape[1] :])


@pytest.mark.parametrize("whole", [False, True], ids=["what is new", "the whole text"])
def test_generation_goes_on_from_it(whole):
    ids, mask = prompts("left")
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    texts = []
    for model in (double(16), double(ONE_PASS)):
        first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
        more = torch.cat([first.sequences, text(3, 44)], dim=1)
        mask_of_all = torch.cat([mask, torch.ones(3, more.shape[1] - 50, dtype=mask.dtype)], dim=1)
        given = more if whole else more[:, first.past_key_values.get_seq_length() :]
        out = model.generate(given, attention_mask=mask_of_all, past_key_values=first.past_key_values, **options)
        texts.append(out[:, -6:])
    same(*texts)
