"""Laws of the baselines: probabilities are probabilities, and compressors remember."""

import random

import numpy as np
import pytest

from rwkv_eval import baselines
from rwkv_eval.baselines import compressed_bits_per_byte, ngram_bits_per_byte
from rwkv_eval.ngram import NGram, modified_discounts

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
