"""Laws of measuring: what is counted is counted once, and probabilities are probabilities."""

import json
import math
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from modeling_rwkv import RwkvConfig
from rwkv_eval import baselines, bits_per_byte
from rwkv_eval.baselines import compressed_bits_per_byte, ngram_bits_per_byte
from rwkv_eval.bits_per_byte import measure
from rwkv_eval.ngram import NGram, modified_discounts
from rwkv_finetune.tokenizer import train_tokenizer

DOCUMENTS = ["The cat sat on the mat.", "Ein Kätzchen saß da. 🐈", "a", "one two three four five six seven " * 9]
BYTES = sum(len(text.encode()) for text in DOCUMENTS)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(DOCUMENTS, 280)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=2)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():  # the paper's initialisation passes no history on
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


# A model


def test_a_model_that_knows_nothing_costs_the_logarithm_of_its_vocabulary(model, tokenizer):
    config = RwkvConfig(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=1)
    uniform = AutoModelForCausalLM.from_config(config).eval()
    uniform.head.weight.data.zero_()
    result = measure(uniform, tokenizer, DOCUMENTS)
    tokens = sum(len(tokenizer(text)["input_ids"]) for text in DOCUMENTS)
    assert (result.tokens, result.bytes) == (tokens, BYTES)
    assert result.bits_per_byte == pytest.approx(tokens * math.log2(len(tokenizer)) / BYTES, rel=1e-6)
    assert result.perplexity == pytest.approx(len(tokenizer), rel=1e-6)


@pytest.mark.parametrize("chunk", [1, 2, 7, 40])
def test_chunks_change_nothing(model, tokenizer, chunk):
    whole, pieces = (measure(model, tokenizer, DOCUMENTS, size) for size in (10_000, chunk))
    assert pieces.nats == pytest.approx(whole.nats, rel=1e-5)
    assert (pieces.tokens, pieces.bytes) == (whole.tokens, whole.bytes)


def test_it_is_the_probability_of_the_text_after_one_end_of_text(model, tokenizer):
    text = DOCUMENTS[0]
    ids = torch.tensor([[0, *tokenizer(text)["input_ids"]]])
    with torch.no_grad():
        predicted = model(ids).logits[0, :-1].double().log_softmax(-1)
    nats = -predicted.gather(-1, ids[0, 1:, None]).sum().item()
    assert measure(model, tokenizer, [text]).nats == pytest.approx(nats, rel=1e-5)


def test_documents_do_not_see_each_other(model, tokenizer):
    together = measure(model, tokenizer, DOCUMENTS).nats
    assert together == pytest.approx(sum(measure(model, tokenizer, [text]).nats for text in DOCUMENTS), rel=1e-9)


def test_a_chunk_of_nothing_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="chunk"):
        measure(model, tokenizer, DOCUMENTS, chunk=0)


def test_the_command_prints_the_measure(model, tokenizer, tmp_path, capsys):
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text("\n<|endoftext|>\n".join(DOCUMENTS), encoding="utf-8")
    capsys.readouterr()
    bits_per_byte.main(["--model", str(tmp_path / "model"), "--file", str(tmp_path / "text.txt"), "--json"])
    printed = json.loads(capsys.readouterr().out)
    assert printed["documents"] == len(DOCUMENTS)
    assert printed["bits_per_byte"] == pytest.approx(measure(model, tokenizer, DOCUMENTS).bits_per_byte, rel=1e-6)


@pytest.mark.parametrize(("model_name", "file"), [("nowhere", "text.txt"), ("nowhere", "missing.txt")])
def test_the_command_refuses_in_one_sentence(tmp_path, monkeypatch, capsys, model_name, file):
    monkeypatch.chdir(tmp_path)
    Path("text.txt").write_text("text")
    with pytest.raises(SystemExit) as stop:
        bits_per_byte.main(["--model", model_name, "--file", file])
    assert stop.value.code == 2 and "Traceback" not in capsys.readouterr().err


# n-grams


def random_documents(vocab_size: int, count: int) -> list[list[int]]:
    """Symbols that depend on the two before them, each document closed by symbol 0."""
    rng = random.Random(3)
    documents = []
    for _ in range(count):
        document = [1, 2]
        while len(document) < 40:
            document.append((document[-1] * 3 + document[-2] + rng.choice([0, 0, 0, 1, 2, 5])) % vocab_size)
        documents.append([*document, 0])
    return documents


@pytest.mark.parametrize("order", [1, 2, 3, 5])
@pytest.mark.parametrize("count", [1, 50])
def test_probabilities_of_all_next_symbols_sum_to_one(order, count):
    vocab_size = 11
    model = NGram.train(random_documents(vocab_size, count), order, vocab_size, start=0)
    rng = random.Random(4)
    contexts = [[], [1], [1, 2, 5], [0, 0], *([rng.randrange(vocab_size) for _ in range(6)] for _ in range(20))]
    for context in contexts:
        following = np.array([model.score([*context, symbol])[-1] for symbol in range(vocab_size)])
        assert following.min() > 0 and following.sum() == pytest.approx(1, abs=1e-12)


def test_a_bigram_is_what_the_formula_says():
    # Too little text to estimate discounts: 0.5 off every count. Bigrams: 01 12 21 12 20.
    model = NGram.train([[1, 2, 1, 2, 0]], order=2, vocab_size=4, start=0)
    bigrams = {(0, 1): 1, (1, 2): 2, (2, 1): 1, (2, 0): 1}
    types = {word: sum(b == word for _, b in bigrams) for word in range(4)}

    def unigram(word: int) -> float:
        kept = max(types[word] - 0.5, 0) / 4
        return kept + 3 * 0.5 / 4 / 4

    def bigram(context: int, word: int) -> float:
        seen = {b: n for (a, b), n in bigrams.items() if a == context}
        total = sum(seen.values())
        return max(seen.get(word, 0) - 0.5, 0) / total + 0.5 * len(seen) / total * unigram(word)

    expected = [bigram(0, 1), bigram(1, 2), bigram(2, 3), unigram(1)]  # 3 was never seen: its context is unknown
    np.testing.assert_allclose(model.score([1, 2, 3, 1]), expected, rtol=1e-12)


def test_order_and_documents_are_kept_apart():
    first, second = [1, 2, 3, 0], [3, 1, 0]
    model, swapped = (NGram.train(pair, 3, 5, start=0) for pair in ([first, second], [second, first]))
    np.testing.assert_array_equal(model.score([1, 2, 3]), swapped.score([1, 2, 3]))


def test_discounts_lie_between_nothing_and_everything():
    counts = np.random.default_rng(0).zipf(1.5, 10_000)
    discounts = modified_discounts(counts)
    assert (discounts >= 0).all() and (discounts <= [0, 1, 2, 3]).all()


@pytest.mark.parametrize(("order", "vocab_size"), [(0, 10), (6, 4096)])
def test_an_impossible_order_is_refused(order, vocab_size):
    with pytest.raises(ValueError, match="order"):
        NGram.train([[1]], order, vocab_size, start=0)


def test_longer_contexts_help_where_there_is_something_to_learn():
    texts = ["the cat sat on the mat and the dog sat on the log. " * 3 for _ in range(5)]
    results = list(ngram_bits_per_byte(texts, texts[:1], baselines.Symbols.of(None), 4).values())
    assert results == sorted(results, reverse=True) and results[-1] < 0.7


# Compressors


def test_a_compressor_remembers_what_it_has_seen():
    noise = random.Random(5).randbytes(4000)
    unseen, seen = (compressed_bits_per_byte(train, noise) for train in (b"", noise))
    assert all(bits > 7.9 for bits in unseen.values())
    assert seen["xz, primed"] < 0.5 and seen["zlib, primed"] < 0.5 and seen["bz2"] == unseen["bz2"]
