"""Laws of the harness model `rwkv`: the numbers of the harness's own `hf`, every token read once."""

import random

import numpy as np
import pytest
import torch

pytest.importorskip("lm_eval")

from lm_eval.api.instance import Instance
from lm_eval.api.model import CachingLM
from lm_eval.api.registry import get_model
from lm_eval.models.huggingface import HFLM
from models import PLAIN, make, text
from peft import LoraConfig, get_peft_model
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

from modeling_rwkv import demo_model_path
from rwkv_eval import harness, tree_reader
from rwkv_eval.harness import RwkvLM
from rwkv_eval.prefix_tree import build, runs_below

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

PLENTY = 2**30
FEW = PLAIN | {"vocab_size": 7}  # so that some guesses are right
WORDS = {"vocab_size": 4096, "hidden_size": 20, "num_hidden_layers": 2}  # the tokenizer's


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo_model_path())


@pytest.fixture(scope="module")
def double():
    """A model whose numbers show every mistake."""
    return make(FEW, dtype=torch.float64)


@pytest.fixture(scope="module")
def wordy():
    """A model of the tokenizer's vocabulary."""
    return make(WORDS)


def encoded(seed: int, number: int = 60, longest: int = 23, vocab_size: int = 7) -> list:
    """Random requests as ids, many of which share prefixes: of few tokens, of each other, twice the same, choices."""
    rng = random.Random(seed)
    few = rng.sample(range(vocab_size), 2)

    def tokens(least: int) -> list[int]:
        return rng.choices(few if rng.random() < 0.7 else range(vocab_size), k=rng.randint(least, longest))

    pairs = [(tokens(1), tokens(1)[:7]) for _ in range(number // 3)]
    pairs += [(rng.choice(pairs)[0], tokens(1)[: rng.choice([1, 1, 5])]) for _ in range(number // 3)]
    for context, continuation in rng.choices(pairs, k=number // 3):
        pairs.append((context + continuation, tokens(1)))  # context that is another text
        pairs.append((context[: rng.randint(1, len(context))], continuation))
    pairs += rng.choices(pairs, k=5)
    rng.shuffle(pairs)
    return [((f"{n}", ""), *pair) for n, pair in enumerate(pairs)]


def instances(pairs: list, kind: str = "loglikelihood") -> list[Instance]:
    return [Instance(kind, {}, pair, n) for n, pair in enumerate(pairs)]


def ours(model, tokenizer, batch_size: int | str = 7, **options) -> RwkvLM:
    return RwkvLM(model, tokenizer=tokenizer, batch_size=batch_size, **options)


def agree(actual: list, expected: list, tolerance: float) -> None:
    assert [greedy for _, greedy in actual] == [greedy for _, greedy in expected]
    np.testing.assert_allclose([x for x, _ in actual], [x for x, _ in expected], rtol=0, atol=tolerance)


def state_bytes(model) -> int:
    cache = model(torch.zeros(1, 1, dtype=torch.long), use_cache=True).past_key_values
    return sum(part.nbytes for layer in cache.layers for part in layer)


def read_by(model) -> list[int]:
    """Becomes a list of how many tokens each forward pass reads."""
    passes: list[int] = []

    def count(module, args, kwargs):
        passes.append(int(kwargs["attention_mask"].sum()) if "attention_mask" in kwargs else 0)

    model.base_model.register_forward_pre_hook(count, with_kwargs=True)
    return passes


# -- the numbers of the harness --------------------------------------------------------------------


@pytest.mark.parametrize("memory", [PLENTY, 12, 3, 0], ids=lambda slots: f"{slots} states")
@pytest.mark.parametrize("batch_size", [1, 7, 32, "auto"])
def test_numbers_are_those_of_the_harness(double, tokenizer, batch_size, memory):
    requests = encoded(seed=len(str(batch_size)))
    expected = HFLM(double, tokenizer=tokenizer, batch_size=5)._loglikelihood_tokens(requests, disable_tqdm=True)
    model = ours(double, tokenizer, batch_size, state_memory=memory * state_bytes(double))
    agree(model._loglikelihood_tokens(requests), expected, 1e-10)
    assert len({greedy for _, greedy in expected}) == 2  # else the flags would show nothing


@pytest.mark.parametrize("longest", [1, 2, 5])
def test_long_texts_are_read_in_parts(double, tokenizer, monkeypatch, longest):
    requests = encoded(seed=3)
    expected = ours(double, tokenizer)._loglikelihood_tokens(requests)
    monkeypatch.setattr(harness, "LONGEST_RUN", longest)
    monkeypatch.setattr(tree_reader, "HEAD_ROWS", longest)
    for slots in (3, 3 * 30):
        model = ours(double, tokenizer, 3, state_memory=slots * state_bytes(double))
        agree(model._loglikelihood_tokens(requests), expected, 1e-10)


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_texts_are_tokenised_as_the_harness_does(wordy, tokenizer, batch_size):
    pairs = [("Once upon a time", " there was a fox"), ("Once upon a time", " there was a dog."), ("", "Once")]
    pairs += [("", "The fox ran home"), ("The fox  ", "ran"), ("The fox\n", "\nran"), ("Hello<|endoftext|>", "a b")]
    pairs += [("<|endoftext|>Once", "upon"), ("", "<|endoftext|>The fox"), ("Q: yes or no?\nA:", " yes"), *pairs[:3]]
    expected = HFLM(wordy, tokenizer=tokenizer).loglikelihood(instances(pairs), disable_tqdm=True)
    agree(ours(wordy, tokenizer, batch_size).loglikelihood(instances(pairs), disable_tqdm=True), expected, 1e-4)


def test_contexts_are_cut_as_the_harness_does(double, tokenizer):
    requests = encoded(seed=4)
    expected = HFLM(double, tokenizer=tokenizer, max_length=23)._loglikelihood_tokens(requests, disable_tqdm=True)
    assert any(len(context) + len(continuation) > 24 for _, context, continuation in requests)
    agree(ours(double, tokenizer, max_length=23)._loglikelihood_tokens(requests), expected, 1e-10)


def test_low_precision_is_that_of_the_harness(tokenizer):
    """Half the model's digits; log-likelihoods of both in float32."""
    model, requests = make(FEW, dtype=torch.bfloat16), encoded(seed=5)
    stock = HFLM(model, tokenizer=tokenizer, softmax_dtype="float32")
    expected = stock._loglikelihood_tokens(requests, disable_tqdm=True)
    difference = [
        a - b for (a, _), (b, _) in zip(ours(model, tokenizer)._loglikelihood_tokens(requests), expected, strict=True)
    ]
    assert np.abs(difference).mean() < 0.05


def test_the_likeliest_of_equals_is_the_first():
    logits = torch.tensor([[1.0, 3.0, 3.0], [2.0, 0.0, 2.0]])
    rows, wanted = torch.tensor([0, 0, 0, 1, 1]), torch.tensor([0, 1, 2, 0, 2])
    expected = logits.argmax(-1)[rows] == wanted
    assert torch.equal(tree_reader._is_likeliest(logits, rows, wanted), expected)


def test_order_changes_no_bit(wordy, tokenizer):
    requests = encoded(seed=6, vocab_size=4096)
    expected = ours(wordy, tokenizer)._loglikelihood_tokens(requests)
    order = random.Random(0).sample(range(len(requests)), len(requests))
    shuffled = ours(wordy, tokenizer)._loglikelihood_tokens([requests[i] for i in order])
    assert shuffled == [expected[i] for i in order]


# -- what it costs ---------------------------------------------------------------------------------


def prefixes(requests: list) -> set[tuple]:
    """Everything that must have been read at some time."""
    texts = [(context + continuation)[:-1] for _, context, continuation in requests]
    return {tuple(tokens[:n]) for tokens in texts for n in range(1, len(tokens) + 1)}


@pytest.mark.parametrize("batch_size", [1, 7, 32])
def test_every_prefix_is_read_once(tokenizer, batch_size):
    model, requests = make(FEW), encoded(seed=7, number=90)
    passes = read_by(model)
    ours(model, tokenizer, batch_size)._loglikelihood_tokens(requests)
    longest = max(len(context) + len(continuation) - 1 for _, context, continuation in requests)
    assert sum(passes) == len(prefixes(requests))
    assert max(passes) <= batch_size * longest


def test_logits_are_computed_where_something_is_asked_and_once(tokenizer):
    model, requests = make(FEW), encoded(seed=8)
    rows: list[int] = []
    model.head.register_forward_hook(lambda module, args, output: rows.append(len(output)))
    ours(model, tokenizer)._loglikelihood_tokens(requests)
    texts = [(context + continuation, len(context)) for _, context, continuation in requests]
    asked = {tuple(tokens[:n]) for tokens, first in texts for n in range(first, len(tokens))}
    assert sum(rows) == len(asked)


@pytest.mark.parametrize("slots", [0, 1, 2, 5])
def test_states_stay_within_their_budget(double, tokenizer, monkeypatch, slots):
    """Those in slots, and those of a batch before and after it; and all slots are free in the end."""
    made, rows = [], []

    class Watched(tree_reader.States):
        def __init__(self, *args):
            super().__init__(*args)
            made.append((self, len(self.free)))

        def take(self, slots):
            rows.append(len(slots))
            return super().take(slots)

    monkeypatch.setattr(tree_reader, "States", Watched)
    size = state_bytes(double)
    memory = (3 * slots + 1) * size
    ours(double, tokenizer, 32, state_memory=memory)._loglikelihood_tokens(encoded(seed=9))
    ((states, free),) = made
    assert free == slots and sorted(states.free) == list(range(1, slots + 1))
    assert sum(part.nbytes for layer in states.layers for part in layer) == (1 + slots) * size
    assert max(rows) == 1 or (slots + 2 * max(rows)) * size <= memory


@pytest.mark.parametrize("slots", [0, 2, 100])
def test_the_bar_counts_what_is_read(tokenizer, monkeypatch, slots):
    bars = []

    class Bar(harness.tqdm):
        def __init__(self, **options):
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr(harness, "tqdm", Bar)
    model = make(FEW)
    memory = 3 * slots * state_bytes(model)
    passes = read_by(model)
    ours(model, tokenizer, state_memory=memory)._loglikelihood_tokens(encoded(seed=13))
    (bar,) = bars
    assert bar.n == bar.total == sum(passes)


@pytest.mark.parametrize("limit", [40, 150])
def test_auto_halves_the_batch_until_it_fits(double, tokenizer, monkeypatch, limit):
    requests = encoded(seed=10)
    expected = ours(double, tokenizer)._loglikelihood_tokens(requests)
    read = tree_reader.TreeReader._read

    def small(self, runs):
        if sum(map(len, runs)) > limit:
            raise RuntimeError("CUDA out of memory.")
        return read(self, runs)

    monkeypatch.setattr(tree_reader.TreeReader, "_read", small)
    agree(ours(double, tokenizer, "auto")._loglikelihood_tokens(requests), expected, 1e-10)
    with pytest.raises(RuntimeError, match="out of memory"):
        ours(double, tokenizer, 32)._loglikelihood_tokens(requests)


@pytest.mark.parametrize("passes", [1, 2])
def test_what_was_interrupted_goes_on_from_the_request_cache(wordy, tokenizer, tmp_path, monkeypatch, passes):
    pairs = [
        (f"The fox {a} the", f" {b}") for a in ("saw", "ate", "met", "lost") for b in ("dog", "big red ball", "a")
    ]
    expected = ours(wordy, tokenizer, 1).loglikelihood(instances(pairs), disable_tqdm=True)
    cached = CachingLM(ours(wordy, tokenizer, 1), str(tmp_path / "requests.db"))
    read, reads = tree_reader.TreeReader._read, []

    def interrupted(self, runs):
        reads.append(runs)
        if len(reads) > 1 + passes:
            raise KeyboardInterrupt
        return read(self, runs)

    monkeypatch.setattr(tree_reader.TreeReader, "_read", interrupted)
    with pytest.raises(KeyboardInterrupt):
        cached.loglikelihood(instances(pairs))
    before = len(cached.dbdict)
    assert 0 < before < len(pairs)
    monkeypatch.setattr(tree_reader.TreeReader, "_read", read)
    agree(cached.loglikelihood(instances(pairs)), expected, 1e-4)
    assert len(cached.dbdict) == len(pairs)


# -- documents, prefixes, states, adapters ---------------------------------------------------------


@pytest.mark.parametrize("longest", [1, 3, 2048])
def test_rolling_is_one_unbroken_pass(wordy, tokenizer, monkeypatch, longest):
    monkeypatch.setattr(harness, "LONGEST_RUN", longest)
    documents = ["Once upon a time there was a fox. " * n for n in (1, 7, 3)] + ["a", "", "The end", "a"]
    model = ours(wordy, tokenizer, max_length=8)  # of windows, which there are none of
    results = model.loglikelihood_rolling(instances([(document,) for document in documents], "loglikelihood_rolling"))
    for document, result in zip(documents, results, strict=True):
        ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer.encode(document)]])
        logprobs = wordy(ids).logits[0, :-1].log_softmax(-1).detach()
        assert result == pytest.approx(float(logprobs.gather(1, ids[0, 1:, None]).sum()), abs=1e-3)


@pytest.mark.parametrize("prefix", ["end-of-text", "newline"])
def test_a_prefix_stands_before_every_text_once(wordy, tokenizer, prefix):
    word = {"end-of-text": "<|endoftext|>", "newline": "\n"}[prefix]
    model = ours(wordy, tokenizer, prefix_token=prefix)
    (token,) = tokenizer.encode(word)
    pairs = [("The fox", " ran home"), (word + "The fox", " ran home"), ("", "The fox"), ("  ", "The fox")]
    pairs += [("\n", "\n\nThe fox")]  # which begins with a token of two lines
    encodings = [([token, *tokenizer.encode("The fox")], tokenizer.encode(" ran home"))] * 2
    encodings += [([token], tokenizer.encode(text)) for text in ("The fox", "  The fox", "\n\n\nThe fox")]
    by_hand = [(pair, *encoding) for pair, encoding in zip(pairs, encodings, strict=True)]
    stock = HFLM(wordy, tokenizer=tokenizer)._loglikelihood_tokens(by_hand, disable_tqdm=True)
    agree(model.loglikelihood(instances(pairs), disable_tqdm=True), stock, 1e-4)
    ids, mask = model.tok_batch_encode(["The fox ran", "A"])
    assert [row[kept == 1].tolist() for row, kept in zip(ids, mask, strict=True)] == [
        [token, *tokenizer.encode("The fox ran")],
        [token, *tokenizer.encode("A")],
    ]
    rolling = model.loglikelihood_rolling(instances([("The fox",)], "loglikelihood_rolling"))
    assert rolling[0] == pytest.approx(stock[2][0], abs=1e-4)


@pytest.mark.parametrize("slots", [0, 2, 100])
def test_every_text_begins_with_the_state(tokenizer, tmp_path, slots):
    """Some of them alone, in one batch with what others go on with."""
    with torch.no_grad():
        learned = make()(text(1, 9), use_cache=True).past_key_values
    learned.save(tmp_path / "state.safetensors")
    begun, requests = make(), encoded(seed=11, vocab_size=61)
    begun.set_initial_state(learned)
    expected = HFLM(begun, tokenizer=tokenizer)._loglikelihood_tokens(requests, disable_tqdm=True)
    options = {"state": str(tmp_path / "state.safetensors"), "state_memory": 3 * slots * state_bytes(begun)}
    model = ours(make(), tokenizer, 32, **options)
    agree(model._loglikelihood_tokens(requests), expected, 1e-4)
    without = ours(make(), tokenizer)._loglikelihood_tokens(requests)
    assert max(abs(a - b) for (a, _), (b, _) in zip(expected, without, strict=True)) > 0.1


@pytest.fixture(scope="module")
def saved(tmp_path_factory, wordy, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    wordy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_an_adapter_counts(saved, tmp_path):
    torch.manual_seed(0)
    targets = ["key", "value", "head"]
    adapted = get_peft_model(make(WORDS), LoraConfig(r=2, target_modules=targets, init_lora_weights=False))
    adapted.save_pretrained(tmp_path)
    arguments = {"pretrained": str(saved), "peft": str(tmp_path), "dtype": "float32", "device": "cpu"}
    requests = encoded(seed=12, vocab_size=4096)
    expected = HFLM(**arguments)._loglikelihood_tokens(requests, disable_tqdm=True)
    agree(RwkvLM(**arguments)._loglikelihood_tokens(requests), expected, 1e-4)
    without = RwkvLM(**arguments | {"peft": None})._loglikelihood_tokens(requests)
    assert max(abs(a - b) for (a, _), (b, _) in zip(expected, without, strict=True)) > 0.1


# -- generation ------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, "auto"])
def test_texts_go_on_as_in_the_harness(wordy, tokenizer, batch_size, monkeypatch):
    contexts = ["Once upon a time", "The fox", "Once upon a time", "A dog and a cat went home.", "Tom", "Lily saw"]
    options = [{"until": ["."], "max_gen_toks": 9}, {"until": ["\n", " the"], "max_gen_toks": 5}]
    requests = instances([(context, option) for context in contexts for option in options], "generate_until")
    expected = HFLM(wordy, tokenizer=tokenizer).generate_until(requests, disable_tqdm=True)
    generate, refused = HFLM._model_generate, []

    def small(self, context, **options):
        if len(context) > 3 and batch_size == "auto":
            refused.append(len(context))
            raise RuntimeError("CUDA out of memory.")
        return generate(self, context, **options)

    monkeypatch.setattr(HFLM, "_model_generate", small)
    model = ours(wordy, tokenizer, batch_size, max_batch_size=8)
    assert model.generate_until(requests, disable_tqdm=True) == expected
    assert bool(refused) == (batch_size == "auto") and model.batch_size == batch_size


def test_equal_texts_go_on_once_unless_they_are_drawn(wordy, tokenizer, monkeypatch):
    rows, generate = [], HFLM._model_generate

    def counted(self, context, **options):
        rows.append(len(context))
        return generate(self, context, **options)

    monkeypatch.setattr(HFLM, "_model_generate", counted)
    for options, expected in (({}, 1), ({"do_sample": True, "temperature": 1.0}, 3)):
        pairs = [("The fox", {"until": ["."], "max_gen_toks": 4} | options)] * 3
        texts = ours(wordy, tokenizer).generate_until(instances(pairs, "generate_until"), disable_tqdm=True)
        assert len(texts) == 3 and sum(rows) == expected
        rows.clear()


def test_a_chat_is_written_by_the_template(wordy):
    tokenizer = AutoTokenizer.from_pretrained(demo_model_path())
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    model = ours(wordy, tokenizer)
    chat = model.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert chat == "user: Hello\n" and model.chat_template(True) == tokenizer.chat_template


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"prefix_token": "space"}, "prefix_token is 'space': choose one of nothing, end-of-text, newline"),
        ({"prefix_token": "newline", "prefix_token_id": 3}, "leave out prefix_token_id"),
        ({"state_memory": -1}, "state_memory is -1"),
    ],
)
def test_arguments_are_refused(wordy, tokenizer, options, words):
    with pytest.raises(ValueError, match=words):
        ours(wordy, tokenizer, **options)


def test_another_model_is_refused(tokenizer):
    other = GPT2LMHeadModel(GPT2Config(n_layer=1, n_embd=8, n_head=1, vocab_size=61))
    with pytest.raises(ValueError, match="GPT2LMHeadModel and no RWKV: use --model hf"):
        ours(other, tokenizer)


def test_what_cannot_be_scored_is_refused(wordy, tokenizer):
    model = ours(wordy, tokenizer, max_length=3)
    with pytest.raises(ValueError, match="no tokens of its own"):
        model.loglikelihood(instances([("The fox", "")]), disable_tqdm=True)
    with pytest.raises(ValueError, match="continuation has 4 tokens: give max_length, now 3"):
        model._loglikelihood_tokens([(("", ""), [1], [2, 3, 4, 5])])


def test_the_harness_finds_it_by_name():
    assert get_model("rwkv") is RwkvLM


# -- the tree --------------------------------------------------------------------------------------


@pytest.mark.parametrize("longest", [1, 4, 100])
@pytest.mark.parametrize("seed", range(4))
def test_the_tree_holds_every_sequence_and_nothing_twice(seed, longest):
    texts = sorted({(*context, *continuation) for _, context, continuation in encoded(seed)})
    sequences = [np.array(tokens) for tokens in random.Random(seed).sample(texts, len(texts))]
    root, ends = build(sequences, longest)
    for tokens, end in zip(sequences, ends, strict=True):
        read, run = [], end
        while run is not root:
            assert len(run) <= longest
            read, run = [run.tokens, *read], run.parent
        np.testing.assert_array_equal(np.concatenate(read), tokens)
    every = {tokens[:n] for tokens in texts for n in range(1, len(tokens) + 1)}
    assert sum(map(len, runs_below(root))) == len(every)
    for run in [root, *runs_below(root)]:
        assert len({int(child.tokens[0]) for child in run.children}) == len(run.children) == run.waiting
        assert all(child.parent is run and child.start == run.end for child in run.children)


def test_a_first_token_cannot_be_asked_about():
    _, (end,) = build([np.array([1, 2])], 9)
    with pytest.raises(ValueError, match="before there is one"):
        end.ask(0, np.array([1, 2, 3]))
