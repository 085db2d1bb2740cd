"""Laws of `generate`: batches, beams, caches and chunks change how a text is computed and never which text."""

import pytest
import torch
from models import agree, make, padded, same, text
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    DynamicCache,
    GenerationConfig,
    PreTrainedTokenizerFast,
    TextIteratorStreamer,
    pipeline,
)

import modeling_rwkv
from modeling_rwkv import RwkvCache, RwkvForCausalLM

NEW = 12


@pytest.fixture(scope="module")
def model():
    return make("wide attention", vocab_size=61)


@pytest.fixture(scope="module")
def tokenizer():
    """One token a letter, and one for the end of text, with which batches are padded."""
    letters = "<abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,;!?-"
    vocabulary = {letter: i for i, letter in enumerate(letters)} | {"<": 0}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<", pad_token="<", padding_side="left")
    assert len(tokenizer) == 60
    return tokenizer


def grow(model, ids, mask=None, **options):
    """Generate ``NEW`` tokens after ids (B, T): (B, NEW) or, with a dict asked for, everything."""
    mask = torch.ones_like(ids) if mask is None else mask
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0} | options
    output = model.generate(ids, attention_mask=mask, **options)
    return output if options.get("return_dict_in_generate") else output[:, ids.shape[1] :]


def rows(*lengths):
    return [text(1, n, seed=n)[0] for n in lengths]


def greedy(model, ids):
    """The definition: read the whole text again for every token."""
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(NEW):
            ids = torch.cat([ids, model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[:, start:]


def beam_search(model, ids, beams, length_penalty=1.0):
    """The definition, for one row and no end of text: keep the likeliest texts of every length."""
    texts = [(0.0, ids[0])]
    for _ in range(NEW):
        with torch.no_grad():
            logits = model(torch.stack([text for _, text in texts]), use_cache=False).logits[:, -1].float()
        longer = [
            (score + p.item(), torch.cat([text, torch.tensor([token])]))
            for (score, text), row in zip(texts, logits.log_softmax(-1), strict=True)
            for token, p in enumerate(row)
        ]
        texts = sorted(longer, key=lambda pair: pair[0], reverse=True)[:beams]
    return torch.stack([text[ids.shape[1] :] for _, text in texts])


# What is generated


def test_greedy_is_the_definition(model):
    ids = text(3, 7)
    expected = greedy(model, ids)
    assert len(expected.unique()) > 5
    same(grow(model, ids), expected)
    same(grow(model, ids, use_cache=False), expected)


@pytest.mark.parametrize("beams", [2, 4])
def test_beam_search_is_the_definition(model, beams):
    prompts = rows(3, 8, 5)
    expected = torch.cat([beam_search(model, row[None], beams) for row in prompts])
    ids, mask = padded(prompts)
    options = {"num_beams": beams, "num_return_sequences": beams}
    same(grow(model, ids, mask, **options), expected)
    same(grow(model, ids, mask, use_cache=False, **options), expected)


@pytest.mark.parametrize(
    "options",
    [{}, {"num_beams": 3}, {"num_beams": 3, "num_return_sequences": 2}, {"repetition_penalty": 1.7}],
    ids=["greedy", "beams", "several", "penalty"],
)
def test_a_left_padded_batch_gives_what_single_prompts_give(model, options):
    prompts = rows(1, 9, 4)
    expected = torch.cat([grow(model, row[None], **options) for row in prompts])
    for use_cache in (True, False):
        same(grow(model, *padded(prompts, filler=5), use_cache=use_cache, **options), expected)


def test_rows_may_end_at_different_times(model):
    prompts = rows(1, 9, 4)
    free = [grow(model, row[None])[0] for row in prompts]
    end = int(free[0][4])
    batch = grow(model, *padded(prompts), eos_token_id=end, pad_token_id=60)
    for row, expected in zip(batch, free, strict=True):
        stop = expected.tolist().index(end) + 1 if end in expected.tolist() else NEW
        same(row[:stop], expected[:stop])
        assert (row[stop:] == 60).all()
    assert (batch == 60).any()


def test_sampling_follows_its_seed(model):
    ids = text(2, 7)

    def sample(seed, **options):
        torch.manual_seed(seed)
        return grow(model, ids, do_sample=True, temperature=1.3, top_p=0.95, top_k=40, **options)

    same(sample(1), sample(1))
    same(sample(1, use_cache=False), sample(1))
    assert not torch.equal(sample(1), sample(2))
    several = sample(1, num_return_sequences=4)
    assert several.shape == (8, NEW) and len({tuple(row.tolist()) for row in several}) == 8


def test_scores_are_the_logits_of_the_text(model):
    ids = text(2, 7)
    output = grow(model, ids, return_dict_in_generate=True, output_logits=True, output_scores=True)
    with torch.no_grad():
        expected = model(output.sequences).logits[:, 6:-1]
    agree(torch.stack(output.logits, dim=1), expected)
    agree(torch.stack(output.scores, dim=1), expected)


def test_a_prompt_may_be_embeddings(model):
    prompts = rows(1, 9, 4)
    ids, mask = padded(prompts)
    embeds = model.get_input_embeddings()(ids).detach()
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 0, "attention_mask": mask}
    same(model.generate(inputs_embeds=embeds, **options), grow(model, ids, mask))
    beams = model.generate(inputs_embeds=embeds, num_beams=3, **options)
    same(beams, grow(model, ids, mask, num_beams=3))


def test_a_text_may_be_longer_than_the_context_length(model):
    short = make("wide attention", vocab_size=61, context_length=8)
    ids = text(1, 6)
    same(grow(short, ids, max_new_tokens=20), grow(model, ids, max_new_tokens=20))


# Continuing


TURN = {"shorter than the past": 3, "longer than the past": 40}


@pytest.mark.parametrize("turn", TURN)
@pytest.mark.parametrize("saved", [False, True], ids=["returned", "saved"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
def test_continuing_equals_one_long_prompt(model, turn, saved, options, tmp_path):
    """Given as the whole text or as what is new, for a left-padded batch."""
    ids, mask = padded(rows(2, 8, 5))
    output = grow(model, ids, mask, return_dict_in_generate=True)
    cache = output.past_key_values
    assert isinstance(cache, RwkvCache) and cache.get_seq_length() == output.sequences.shape[1] - 1
    if saved:
        cache.save(tmp_path / "talk")
        cache = RwkvCache.load(tmp_path / "talk")
    if options:
        cache.batch_repeat_interleave(3)
    whole = torch.cat([output.sequences, text(3, TURN[turn])], dim=1)
    whole_mask = torch.cat([mask, torch.ones(3, whole.shape[1] - mask.shape[1], dtype=mask.dtype)], dim=1)
    unread = slice(cache.get_seq_length(), None)
    expected = grow(model, whole, whole_mask, **options)
    for given, given_mask in (
        (whole, whole_mask),
        (whole[:, unread], whole_mask),
        (whole[:, unread], whole_mask[:, unread]),
    ):
        same(grow(model, given, given_mask, past_key_values=cache.clone(), **options), expected)


@pytest.mark.parametrize("length", [3, 40])
def test_continuing_needs_no_mask(model, length):
    ids = text(1, 7)
    with torch.no_grad():
        cache = model(ids).past_key_values
    whole = torch.cat([ids, text(1, length)], dim=1)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 60}
    expected = model.generate(whole, **options)[:, -NEW:]
    for given in (whole, whole[:, 7:]):
        same(model.generate(given, past_key_values=cache.clone(), **options)[:, -NEW:], expected)


@pytest.mark.parametrize("prompts", [(5, 5), (2, 7)], ids=["equal", "padded"])
@torch.no_grad()
def test_continuing_the_whole_text_may_hold_the_pad_token(model, prompts):
    """Where no mask says otherwise transformers takes it for padding, also where a row wrote it or ended early."""
    ids, mask = padded(rows(*prompts), filler=60)
    written = torch.cat([ids, torch.tensor([[3, 60, 4], [5, 6, 60]])], dim=1)
    cache = model(written, attention_mask=torch.cat([mask, torch.ones(2, 3)], dim=1)).past_key_values
    more, read = text(2, 4), []
    hook = model.register_forward_pre_hook(lambda _, __, inputs: read.append(inputs["input_ids"]), with_kwargs=True)
    options = {"max_new_tokens": 1, "do_sample": False, "pad_token_id": 60}
    given = model.generate(torch.cat([written, more], dim=1), past_key_values=cache.clone(), **options)
    hook.remove()
    same(read[0], more)
    agree(given[:, -1], model(more, past_key_values=cache).logits[:, -1].argmax(-1))


@torch.no_grad()
def test_one_prompt_serves_a_batch_of_conversations(model):
    prompt, (ids, mask) = text(1, 9), padded(rows(2, 5, 3), filler=60)
    many = model(prompt).past_key_values
    many.batch_repeat_interleave(3)
    whole = torch.cat([prompt.expand(3, -1), ids], dim=1)
    expected = grow(model, whole, torch.cat([torch.ones(3, 9), mask], dim=1))
    same(grow(model, ids, mask, past_key_values=many), expected)


@pytest.mark.parametrize("length", [3, 40])
def test_continuing_may_be_from_embeddings(model, length):
    """The whole, or what is new where that is shorter than the past."""
    whole = torch.cat([text(2, 7), text(2, length)], dim=1)
    with torch.no_grad():
        cache = model(whole[:, :7]).past_key_values
        embeds = model.get_input_embeddings()(whole)
    options = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": 60}
    for given in (embeds, embeds[:, 7:])[: 2 if length < 7 else 1]:
        mask = torch.ones(2, 7 + length)
        output = model.generate(inputs_embeds=given, attention_mask=mask, past_key_values=cache.clone(), **options)
        same(output, grow(model, whole))


def test_the_same_prompt_may_be_said_again(model):
    """New ids that repeat what was read, and more: they are the whole text, unless a mask says that all are new."""
    ids = text(1, 7)
    with torch.no_grad():
        cache = model(ids).past_key_values
    twice = torch.cat([ids, ids, ids[:, :2]], dim=1)
    again, mask = twice[:, 7:], torch.ones_like(twice)
    same(grow(model, again, mask, past_key_values=cache.clone()), grow(model, twice))
    same(grow(model, again, past_key_values=cache.clone()), grow(model, again))


def test_one_cache_serves_many_continuations(model):
    """A prompt is read once; every continuation starts from a clone."""
    prompt, ends = text(1, 9), rows(2, 5, 3)
    with torch.no_grad():
        cache = model(prompt).past_key_values
    for end in ends:
        whole = torch.cat([prompt, end[None]], dim=1)
        same(grow(model, whole, past_key_values=cache.clone()), grow(model, whole))
    assert cache.get_seq_length() == 9


def test_an_empty_cache_is_filled(model):
    ids = text(2, 7)
    cache = RwkvCache()
    same(grow(model, ids, past_key_values=cache), grow(model, ids))
    assert cache.get_seq_length() == 7 + NEW - 1 and cache.has_read(
        torch.cat([ids, greedy(model, ids)[:, :-1]], dim=1)
    )


@pytest.mark.parametrize("size", [1, 4, 100])
def test_a_prompt_may_be_read_in_chunks(model, size):
    ids, mask = padded(rows(2, 9, 5))
    cache = RwkvCache()
    same(grow(model, ids, mask, prefill_chunk_size=size, past_key_values=cache), grow(model, ids, mask))


def test_assisted_generation_is_refused(model):
    """It takes back tokens that were read, which a recurrent state cannot."""
    for assistant in ({"assistant_model": make(vocab_size=61)}, {"prompt_lookup_num_tokens": 3}):
        with pytest.raises(ValueError, match="stateful"):
            grow(model, text(1, 7), **assistant)


# As people use it


def test_the_auto_class_is_ours(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is RwkvForCausalLM and type(loaded).__module__.startswith(modeling_rwkv.__name__)
    same(grow(loaded, text(2, 7)), grow(model, text(2, 7)))


def test_text_can_be_streamed(model, tokenizer):
    ids = tokenizer("Once upon a time", return_tensors="pt").input_ids
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, timeout=60)
    new = grow(model, ids, streamer=streamer)
    assert "".join(streamer) == tokenizer.decode(new[0])


def test_generation_stops_at_a_string(model, tokenizer):
    ids = tokenizer("Once", return_tensors="pt").input_ids
    free = tokenizer.decode(grow(model, ids)[0])
    stop = free[3:5]
    stopped = grow(model, ids, tokenizer=tokenizer, stop_strings=[stop])
    assert tokenizer.decode(stopped[0]) == free[: free.index(stop) + 2]


def test_a_pipeline_with_a_batch_gives_what_single_prompts_give(model, tokenizer, tmp_path):
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    write = pipeline("text-generation", model=str(tmp_path), device="cpu")
    assert isinstance(write.model, RwkvForCausalLM)
    settings = GenerationConfig(max_new_tokens=NEW, do_sample=False, pad_token_id=0)
    prompts = ["Once upon a time", "No", "There was"]
    batch = write(prompts, batch_size=3, generation_config=settings)
    alone = [write(prompt, generation_config=settings) for prompt in prompts]
    assert batch == alone
    for prompt, (result,) in zip(prompts, batch, strict=True):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        whole = torch.cat([ids, grow(model, ids)], dim=1)[0]
        assert result["generated_text"] == tokenizer.decode(whole, skip_special_tokens=True)


def test_nothing_new_is_refused(model):
    """What a cache has read leaves nothing to predict from; said to come again, it does."""
    ids = text(2, 6)
    with torch.no_grad():
        cache = model(ids).past_key_values
    with pytest.raises(ValueError, match="already read all 6 given ids"):
        grow(model, ids, past_key_values=cache.clone())
    twice = torch.cat([ids, ids], dim=1)
    same(grow(model, ids, torch.ones_like(twice), past_key_values=cache.clone()), grow(model, twice))


def test_another_kind_of_cache_is_refused_by_name(model):
    with pytest.raises(ValueError, match="DynamicCache"):
        grow(model, text(1, 4), past_key_values=DynamicCache())
