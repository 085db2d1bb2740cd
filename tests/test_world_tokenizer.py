"""The tokenizer of World models against the one of the official `rwkv` package, and what transformers adds to it."""

import json
import random
import subprocess
import sys
from bisect import bisect_right
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from checkpoint_cases import SMALL, blink_state, make_tokenizer, save
from commands import random_model, refused, rwkv, write_on  # noqa: F401 - fixtures
from rwkv.rwkv_tokenizer import TRIE_TOKENIZER
from tokenizers import Tokenizer
from transformers import AutoTokenizer, GPTNeoXTokenizer

from modeling_rwkv import RwkvConfig, RwkvTokenizer
from modeling_rwkv.streaming import TextPieces
from modeling_rwkv.tokenization_rwkv import END_OF_TEXT, installed_vocab, read_vocab

SPACES = [chr(c) for c in range(0x3001) if chr(c).isspace()]
TEXTS = {
    "nothing": "",
    "prose": "“Where's the fox?” she asked — and nobody, at 5 o'clock, answered…\n\nSo they left; it's 12,345.67 km.",
    "code": Path(__file__).read_text(encoding="utf-8"),
    "Chinese": "天空是蓝色的。\n今天天气很好\uff0c\n我们去公园散步吧……《红楼梦》\u3000第一回",
    "Japanese": "吾輩は猫である。名前はまだ無い。ｶﾀｶﾅもカタカナも、\n「ひらがな」も。",
    "Thai": "ภาษาไทยไม่เว้นวรรคระหว่างคำ สวัสดีครับ ๑๒๓",
    "Arabic": "السَّلامُ عَلَيْكُم، كيف حالك؟ ١٢٣",
    "emoji": "👩‍👩‍👧‍👦🏳️‍🌈👍🏽 😀😀😀 ☃️🇩🇪",
    "marks": "e\u0301 \u0301\ufeff\u200d\u202e\0\x7f\ufffd\ufffe\U0010ffff",
    "letters of bytes": "Ġ Ċ Ń ł ¡ÿ",
    "names of tokens": "<s> </s> <|endoftext|> <|rwkv_tokenizer",
    "every character of two bytes": "".join(map(chr, range(0x800))),
}


def any_text(seed: int, count: int, longest: int = 60) -> list[str]:
    """Random texts of all of Unicode, runs of white space and of one letter, and words."""
    draw = random.Random(seed)

    def piece() -> str:
        limit = draw.choice((0x80, 0x800, 0x3100, 0xD800, 0x20000, 0x110000))
        character = chr(draw.randrange(limit))
        if "\ud800" <= character <= "\udfff":
            character = "\ue000"
        return draw.choice((character, character, draw.choice(SPACES), character * draw.randrange(20), " the", "。\n"))

    return ["".join(piece() for _ in range(draw.randrange(longest))) for _ in range(count)]


@pytest.fixture(scope="module")
def reference():
    return TRIE_TOKENIZER(str(installed_vocab()))


@pytest.fixture(scope="module")
def world():
    return RwkvTokenizer(installed_vocab())


@pytest.fixture(scope="module")
def saved(world, tmp_path_factory):
    return world.save_pretrained(tmp_path_factory.mktemp("world"))[0].rpartition("/")[0]


@pytest.fixture(name="fresh")
def loaded(saved):
    """One that a test may change."""
    return AutoTokenizer.from_pretrained(saved)


@pytest.fixture(scope="module")
def small_vocab(tmp_path_factory):
    """Every byte, and three words."""
    tokens = [*(bytes([byte]) for byte in range(256)), b"fox", b" the", "天".encode()]
    path = tmp_path_factory.mktemp("vocab") / "vocab.txt"
    path.write_text("".join(f"{i} {token!r} {len(token)}\n" for i, token in enumerate(tokens, start=1)))
    return path


# -- the same as the reference ---------------------------------------------------------------------


@pytest.mark.parametrize("name", TEXTS)
def test_ids_are_those_of_the_reference(world, reference, name):
    ids = world(TEXTS[name]).input_ids
    assert ids == reference.encode(TEXTS[name])
    assert world.decode(ids) == TEXTS[name]


def test_random_texts(world, reference):
    texts = any_text(seed=1, count=10_000)
    for text, ids in zip(texts, world(texts).input_ids, strict=True):
        assert ids == reference.encode(text), text
        assert world.decode(ids) == text


def test_every_token_is_read_as_itself_and_cut_as_the_reference_does(world, reference):
    """Also with its last byte replaced, which leads down the trie and back up."""
    for token, number in read_vocab(installed_vocab()).items():
        assert world.encode_bytes(token) == [number]
        astray = token[:-1] + bytes([(token[-1] + 1) % 256])
        assert world.encode_bytes(astray * 2) == reference.encodeBytes(astray * 2)


def test_bytes_that_are_no_text(world, reference):
    draw = random.Random(2)
    for length in [*range(10), *draw.choices(range(400), k=500)]:
        data = draw.randbytes(length)
        ids = world.encode_bytes(data)
        assert ids == reference.encodeBytes(data)
        assert world.decode_bytes(ids) == data
        assert world.decode(ids) == data.decode(errors="replace")


@pytest.mark.parametrize(
    "unit", ["a", " ", "\n", "😀", "我", "=", "\t ", "\x80", "".join(random.Random(3).choices("+/0123ABCxyz", k=999))]
)
def test_long_words(world, reference, unit):
    """Tenths of a second each. In quadratic time, minutes: the limit of every test's time would end it."""
    text = unit * (200_000 // len(unit))
    assert world(text).input_ids == reference.encode(text)


@pytest.mark.parametrize("seed", range(3))
def test_any_vocabulary_with_every_byte(tmp_path, seed):
    """Tokens that are beginnings of others or not, of few letters, with all that a regular expression means."""
    draw = random.Random(seed)
    alphabet = b"\\^$.|?*+()[]{}-&#~/ ab\n\xc3\xa9\xf0"
    tokens = {bytes([byte]) for byte in range(256)}
    tokens |= {bytes(draw.choices(alphabet, k=draw.randrange(1, 9))) for _ in range(2000)} | {b"a" * 300}
    ids = draw.sample(range(1, 5000), len(tokens))
    lines = [f"{i} {token!r} {len(token)}\n" for i, token in zip(ids, sorted(tokens), strict=True)]
    (tmp_path / "vocab.txt").write_text("".join(lines))
    ours, reference = RwkvTokenizer(tmp_path / "vocab.txt"), TRIE_TOKENIZER(str(tmp_path / "vocab.txt"))
    for length in range(0, 1000, 7):
        data = bytes(draw.choices(alphabet, k=length))
        assert ours.encode_bytes(data) == reference.encodeBytes(data)


# -- what transformers adds ------------------------------------------------------------------------


def test_offsets_cover_the_bytes_of_each_token(world):
    """A token of a part of a character covers all of it."""
    for text in (*TEXTS.values(), *any_text(seed=4, count=100)):
        encoding = world(text, return_offsets_mapping=True)
        bounds = [0, *accumulate(len(character.encode()) for character in text)]
        ends = [0, *accumulate(len(world.decode_bytes([i])) for i in encoding.input_ids)]
        expected = [(bisect_right(bounds, a) - 1, bisect_right(bounds, b - 1)) for a, b in pairwise(ends)]
        assert list(map(tuple, encoding.offset_mapping)) == expected


def test_saved_and_loaded(world, fresh, saved):
    assert type(fresh) is RwkvTokenizer and fresh.is_fast
    assert fresh.backend_tokenizer.to_str() == world.backend_tokenizer.to_str()
    assert fresh.special_tokens_map == world.special_tokens_map
    assert fresh.encode_bytes(b"\xff the") == world.encode_bytes(b"\xff the")
    alone = Tokenizer.from_file(f"{saved}/tokenizer.json")
    for text in TEXTS.values():
        assert alone.encode(text).ids == fresh(text).input_ids == world(text).input_ids


def test_a_saved_folder_needs_this_package_only_for_bytes(saved, world):
    text = "foxes, 天空\n\n👍🏽"
    code = "import sys, transformers; t = transformers.AutoTokenizer.from_pretrained(sys.argv[1]); "
    code += "assert 'modeling_rwkv' not in sys.modules; print(t.padding_side, t(sys.argv[2]).input_ids)"
    done = subprocess.run([sys.executable, "-c", code, saved, text], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"left {world(text).input_ids}"


def test_a_folder_with_the_vocabulary_alone(tmp_path, world):
    (tmp_path / installed_vocab().name).write_bytes(installed_vocab().read_bytes())
    loaded = RwkvTokenizer.from_pretrained(tmp_path)
    assert loaded.backend_tokenizer.to_str() == world.backend_tokenizer.to_str()


def test_zero_ends_texts_and_pads(world, reference):
    assert (world.eos_token_id, world.pad_token_id, world.bos_token_id) == (0, 0, 0)
    batch = world(["fox", "the fox eats"], padding=True, return_tensors="pt")
    assert batch.input_ids[0].tolist() == [0] * int((batch.attention_mask[0] == 0).sum()) + reference.encode("fox")
    assert batch.input_ids.dtype == torch.int64
    ids = world(f"fox{END_OF_TEXT}é").input_ids
    assert ids == [*reference.encode("fox"), 0, *reference.encode("é")]
    assert world.decode(ids) == f"fox{END_OF_TEXT}é" and world.decode(ids, skip_special_tokens=True) == "foxé"
    assert world.decode_bytes(ids, skip_special_tokens=True).decode() == "foxé"
    plain = world(END_OF_TEXT, split_special_tokens=True).input_ids
    assert plain == reference.encode(END_OF_TEXT) == world.encode_bytes(END_OF_TEXT.encode())


def test_other_ends_of_text_and_padding(small_vocab):
    """Id 0 is a special token all the same."""
    tokenizer = RwkvTokenizer(small_vocab, eos_token="<end>", pad_token="<pad>", bos_token=None)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id, tokenizer.bos_token_id) == (260, 261, None)
    assert tokenizer(f"fox{END_OF_TEXT}<end>").input_ids == [257, 0, 260]
    assert tokenizer.decode([257, 0, 260], skip_special_tokens=True) == "fox"


def test_a_folder_that_names_no_tokenizer_is_read_as_before(tmp_path):
    RwkvConfig(hidden_size=8, num_hidden_layers=1).save_pretrained(tmp_path)
    make_tokenizer(270).save(str(tmp_path / "tokenizer.json"))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert type(tokenizer) is GPTNeoXTokenizer and tokenizer.eos_token_id == 0


def test_a_beginning_of_text_if_asked_for(saved, tmp_path, reference):
    tokenizer = RwkvTokenizer.from_pretrained(saved, add_bos_token=True)
    tokenizer.save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each("fox").input_ids == [0, *reference.encode("fox")]
        assert each("fox", add_special_tokens=False).input_ids == reference.encode("fox")


def test_added_tokens(fresh, reference, tmp_path):
    assert fresh.add_tokens(["<tool>", "狐狸!"]) == 2 and fresh.add_special_tokens({"extra_special_tokens": ["<end>"]})
    first = max(read_vocab(installed_vocab()).values()) + 1
    text = "é <tool>fox 狐狸!\n<end>"
    between = [reference.encode(part) for part in ("é ", "fox ", "\n")]
    ids = [*between[0], first, *between[1], first + 1, *between[2], first + 2]
    fresh.save_pretrained(tmp_path)
    for tokenizer in (fresh, AutoTokenizer.from_pretrained(tmp_path)):
        assert tokenizer(text).input_ids == ids
        assert tokenizer.decode(ids) == tokenizer.decode_bytes(ids).decode() == text
        assert tokenizer.decode(ids, skip_special_tokens=True) == text.removesuffix("<end>")


# -- decoding as tokens come -----------------------------------------------------------------------


@pytest.mark.parametrize("prompt", ["", "the fox 😀"])
def test_a_stream_is_the_whole_and_never_shows_half_a_character(world, prompt):
    for text in (*TEXTS.values(), *any_text(seed=5, count=100)):
        prompt_ids, ids, pieces = world(prompt).input_ids or [0], world(text).input_ids, []
        stream = TextPieces(world, pieces.append)
        stream.put(torch.tensor([prompt_ids]))
        for i in ids:
            stream.put(torch.tensor([i]))
            assert text.startswith("".join(pieces))
        stream.end()
        assert "".join(pieces) == text


def test_broken_characters_do_not_take_the_rest_with_them(world):
    ids = [*world.encode_bytes(b"a \xf0\x9f\x98"), *world.encode_bytes(b"fox \xff!")]
    assert world.decode(ids) == "a \ufffdfox \ufffd!"
    pieces: list[str] = []
    stream = TextPieces(world, pieces.append)
    for i in [0, *ids]:
        stream.put(torch.tensor([i]))
    stream.end()
    assert "".join(pieces) == "a \ufffdfox \ufffd!"


# -- beside converted weights ----------------------------------------------------------------------


def world_weights(path, vocab_size):
    return save(path / "world.pth", blink_state(SMALL._replace(vocab=vocab_size)))


@pytest.mark.parametrize("more", [0, 7])
def test_a_converted_world_model_generates(tmp_path, small_vocab, more):
    done = rwkv("convert", world_weights(tmp_path, 260 + more), tmp_path / "out", "--vocab", small_vocab)
    assert (done.exit_code, done.stderr) == (0, "")
    assert str(tmp_path / "out/tokenizer.json") in done.stdout
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert type(tokenizer) is RwkvTokenizer and tokenizer.model_max_length == 1024
    assert tokenizer("fox the 天").input_ids == [257, 258, 33, 259]
    assert write_on(tmp_path / "out", "--seed", 1, prompt="fox the 天").stdout.startswith("fox the 天")

    rwkv("convert", tmp_path / "out", tmp_path / "again.pth")
    again = rwkv("convert", tmp_path / "again.pth", tmp_path / "again", "--tokenizer", tmp_path / "out")
    assert again.exit_code == 0
    assert type(AutoTokenizer.from_pretrained(tmp_path / "again")) is RwkvTokenizer


def test_the_vocabulary_of_the_installed_package(tmp_path, world):
    assert rwkv("convert", world_weights(tmp_path, 65536), tmp_path / "out", "--vocab", "world").exit_code == 0
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer(TEXTS["emoji"]).input_ids == world(TEXTS["emoji"]).input_ids


def test_vocabularies_that_do_not_fit_are_refused(tmp_path, small_vocab, monkeypatch):
    weights, out = world_weights(tmp_path, 259), tmp_path / "out"
    convert = ("convert", weights, out, "--vocab")
    refused(rwkv(*convert, small_vocab), small_vocab, "260 tokens", "259")
    refused(rwkv(*convert, tmp_path / "none.txt"), tmp_path / "none.txt", "does not exist")
    refused(rwkv(*convert, weights), weights, "line 1 ")
    refused(rwkv(*convert, small_vocab, "--tokenizer", out), small_vocab, "leave one out")
    monkeypatch.setattr("modeling_rwkv.tokenization_rwkv.WORLD_VOCAB", "none.txt")
    refused(rwkv(*convert, "world"), "pip install rwkv")
    assert list(tmp_path.iterdir()) == [weights]


def test_a_pth_file_holds_no_vocabulary(tmp_path, folder, small_vocab):
    refused(rwkv("convert", folder, tmp_path / "out.pth", "--vocab", small_vocab), "cannot hold a tokenizer")


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["ab\ud800c", ["fox", "ab\udfff"], [["ab\udc80", "fox"]]])
def test_lone_surrogates_are_refused(world, text):
    with pytest.raises(ValueError, match=r"lone surrogate, '\\ud.*at 2.*encode_bytes"):
        world(text, is_split_into_words=isinstance(text[0], list))


def test_what_is_no_text_is_left_to_transformers(world):
    with pytest.raises((TypeError, ValueError), match="must be"):
        world(["fox", 3])


def test_added_tokens_that_could_not_be_decoded_are_refused(fresh):
    with pytest.raises(ValueError, match="naïve"):
        fresh.add_tokens(["naïve"])


def test_ids_without_a_token_have_no_bytes(world):
    with pytest.raises(ValueError, match="65535"):
        world.decode_bytes([33, 65535])


@pytest.mark.parametrize(
    ("line", "word"),
    [
        ("words", "words"),
        ("300 'a'", "'a'"),
        ("300 'é' 1", "do not agree"),
        ("300 f'{1}' 1", "literal"),
        ("300 __import__('os') 2", "literal"),
        ("300 7 1", "do not agree"),
        ("300 '' 0", "do not agree"),
        ("0 'ab' 2", "do not agree"),
        ("x 'ab' 2", "invalid literal"),
        ("300 'ab 2", "literal"),
        ("300 'a' 1", "second time"),
        ("9 'ab' 2", "second time"),
    ],
)
def test_a_vocabulary_that_is_none(tmp_path, line, word):
    every_byte = [f"{byte + 1} {bytes([byte])!r} 1" for byte in range(256)]
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*every_byte, line]), encoding="utf-8")
    with pytest.raises(ValueError, match=f"line 257 of {path}") as error:
        RwkvTokenizer(path)
    assert word in str(error.value)
    path.write_text("\n".join(every_byte[:-3]))
    with pytest.raises(ValueError, match="0xfd"):
        RwkvTokenizer(path)


def test_no_vocabulary(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError):
        RwkvTokenizer(tmp_path / "none.txt")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install rwkv"):
        RwkvTokenizer()


def test_nothing_but_names_is_in_the_settings(saved):
    settings = json.loads(Path(saved, "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "RwkvTokenizer"
    assert not any(str(installed_vocab().parent) in str(value) for value in settings.values())
