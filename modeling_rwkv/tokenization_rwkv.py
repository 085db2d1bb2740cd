"""The tokenizer of RWKV World models: the longest token that fits, again and again, over the bytes of a text.

It is a pipeline of the `tokenizers` library. Every byte becomes a letter, one regular expression cuts this text into
tokens, and a table gives their ids. The expression is the trie of the vocabulary: it tries the longest token first
and reads at most that many letters for each, so encoding is exact and takes time in proportion to length.

WordPiece over the same letters is as exact and 1.3 to 1.6 times as fast on prose, but takes quadratic time and more
for long words. A native trie would be faster still, and leave offsets, added tokens, parallel batches and saving to be
written here. And this way a saved `tokenizer.json` works without this package, wherever `tokenizers` does.
"""

import ast
import copy
import importlib.util
from collections import defaultdict
from os import PathLike
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import WordLevel
from transformers import BatchEncoding, PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from modeling_rwkv.sharing import TOKENIZER_FIELDS, UploadsHubFile, copy_hub_file, is_shared

END_OF_TEXT = "<|rwkv_tokenizer_end_of_text|>"  # as others who publish World models call it
WORLD_VOCAB = "rwkv_vocab_v20230424.txt"
LETTERS: dict[int, str] = bytes_to_unicode()  # the letter that stands for each byte, as in GPT-2
BYTES = {letter: byte for byte, letter in LETTERS.items()}
_OPERATORS = frozenset(r"\^$.|?*+()[]{}-&")  # of a regular expression, or of a set of letters in it


class RwkvTokenizer(UploadsHubFile, PreTrainedTokenizerFast):
    """The tokenizer of RWKV World models; a fast one in the sense of transformers.

    Id 0 ends a text and pads; it is not part of the vocabulary file. `add_bos_token=True` puts it before every text,
    as `bos_token`. Texts and ids are those of the `rwkv` package's tokenizer, except for the names of special and
    added tokens, which are text there (and here with `split_special_tokens=True`).

    Args:
        vocab_file: lines of `<id> <a str or bytes literal of Python> <length in bytes>`, ids from 1 up in any order;
            every byte must be a token. None reads the World vocabulary inside the installed `rwkv` package.

    Raises:
        ValueError: a line of the vocabulary file that is not of this form, or a byte that is no token.
        FileNotFoundError: no vocabulary file.
    """

    vocab_files_names = {"tokenizer_file": "tokenizer.json", "vocab_file": WORLD_VOCAB}
    model_input_names = ["input_ids", "attention_mask"]
    _registered = False

    def __init__(self, vocab_file: str | PathLike[str] | None = None, **kwargs: Any) -> None:
        if kwargs.get("tokenizer_file") is None and kwargs.get("tokenizer_object") is None:
            self._tokenizer = _pipeline(read_vocab(installed_vocab() if vocab_file is None else vocab_file))
            for role in ("bos_token", "eos_token", "pad_token"):
                kwargs.setdefault(role, END_OF_TEXT)
            kwargs.setdefault("padding_side", "left")
        super().__init__(**kwargs)

    @classmethod
    def convert_to_native_format(cls, trust_remote_code: bool = False, **kwargs: Any) -> dict[str, Any]:
        """A tokenizer.json is loaded as it is; transformers would take it apart for `__init__` to build again."""
        return kwargs

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoTokenizer") -> None:
        """Save what programs need that do not know this package with every tokenizer from now on, see sharing.py."""
        cls._registered = True

    def save_pretrained(self, save_directory: str | PathLike[str], *args: Any, **kwargs: Any) -> tuple[str, ...]:
        if self._registered or is_shared(self.init_kwargs.get("auto_map")):
            self.init_kwargs |= copy.deepcopy(TOKENIZER_FIELDS)
            copy_hub_file(save_directory)
        return super().save_pretrained(save_directory, *args, **kwargs)

    def encode_bytes(self, data: bytes) -> list[int]:
        """Ids of bytes that need not be UTF-8. Nothing is added, and no special or added token is looked for."""
        cut = Tokenizer(self.backend_tokenizer.model)
        cut.pre_tokenizer = self.backend_tokenizer.pre_tokenizer[1]
        return cut.encode(data.decode("latin-1").translate(LETTERS)).ids

    def decode_bytes(self, ids: list[int], skip_special_tokens: bool = False) -> bytes:
        """The bytes that tokens stand for, which need not be UTF-8; `decode` writes U+FFFD where they are not.

        Raises:
            ValueError: an id that is no token.
        """
        added, parts = self.added_tokens_decoder, []
        for i in ids:
            if (token := added.get(i)) is not None:
                parts.append(b"" if skip_special_tokens and token.special else token.content.encode())
            elif (letters := self.backend_tokenizer.id_to_token(i)) is not None:
                parts.append(bytes(map(BYTES.__getitem__, letters)))
            else:
                raise ValueError(f"id {i} is no token of this tokenizer: give ids below {len(self)} that are")
        return b"".join(parts)

    def _encode_plus(self, text: Any, text_pair: Any = None, **kwargs: Any) -> BatchEncoding:
        try:
            return super()._encode_plus(text, text_pair, **kwargs)
        except TypeError as error:
            _refuse_surrogates((text, text_pair), error)
            raise

    def _add_tokens(self, new_tokens: list[str | AddedToken], special_tokens: bool = False) -> int:
        for token in map(str, new_tokens):
            if not token.isascii() and BYTES.keys() >= set(token):
                raise ValueError(
                    f"the token {token!r} cannot be added: its letters also stand for bytes, and would be decoded as "
                    "these; write it in ASCII, or with a character above U+0143"
                )
        return super()._add_tokens(new_tokens, special_tokens)


def installed_vocab() -> Path:
    """The World vocabulary inside the installed `rwkv` package, which is not imported.

    Raises:
        FileNotFoundError: there is none.
    """
    package = importlib.util.find_spec("rwkv")
    for folder in (package and package.submodule_search_locations) or ():
        if (path := Path(folder) / WORLD_VOCAB).is_file():
            return path
    raise FileNotFoundError(f"no package rwkv with a {WORLD_VOCAB} is installed: pip install rwkv, or give the file")


def read_vocab(path: str | PathLike[str]) -> dict[bytes, int]:
    """Tokens and their ids from a vocabulary file, checked as `RwkvTokenizer` says.

    Raises:
        ValueError: names the line, or the byte that is no token.
    """
    vocab: dict[bytes, int] = {}
    ids = {0}
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            token_id, rest = line.decode().split(" ", 1)
            literal, length = rest.rsplit(" ", 1)
            text = ast.literal_eval(literal)
            token = text.encode() if isinstance(text, str) else text
            if not isinstance(token, bytes) or len(token) != int(length) or not token or int(token_id) < 1:
                raise ValueError("the parts of the line do not agree")
        except (SyntaxError, ValueError) as error:
            raise ValueError(
                f"line {number} of {path} is {line[:60]!r}, not an id from 1 up, a Python literal of a token and its "
                f"length in bytes ({error}): give an RWKV vocabulary such as {WORLD_VOCAB}"
            ) from error
        if token in vocab or int(token_id) in ids:
            raise ValueError(f"line {number} of {path} has a token or an id a second time ({line[:60]!r}): remove it")
        vocab[token] = int(token_id)
        ids.add(int(token_id))
    if missing := [byte for byte in range(256) if bytes([byte]) not in vocab]:
        raise ValueError(f"the byte {missing[0]:#04x} is no token in {path}: give a vocabulary with every byte")
    return vocab


def _pipeline(vocab: dict[bytes, int]) -> Tokenizer:
    ids = {token.decode("latin-1").translate(LETTERS): i for token, i in vocab.items()}
    tokenizer = Tokenizer(WordLevel({END_OF_TEXT: 0} | ids, unk_token=END_OF_TEXT))
    to_letters = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    cut = pre_tokenizers.Split(Regex(_longest_first(list(ids))), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([to_letters, cut])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END_OF_TEXT])
    return tokenizer


def _longest_first(words: list[str]) -> str:
    """A regular expression for the longest of `words` that the text goes on with; "" is none or may be one of them."""
    rests: dict[str, list[str]] = defaultdict(list)
    for word in words:
        if word:
            rests[word[0]].append(word[1:])
    longer = sorted((first for first in rests if rests[first] != [""]), key=lambda first: -len(rests[first]))
    branches = [_escaped(first) + _longest_first(rests[first]) for first in longer]
    if last := "".join(_escaped(first) for first in rests if rests[first] == [""]):
        branches.append(f"[{last}]")
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)})" + ("?" if "" in words else "")


def _escaped(letter: str) -> str:
    return "\\" + letter if letter in _OPERATORS else letter


def _refuse_surrogates(texts: Any, cause: Exception) -> None:
    """Say which character has no UTF-8, if one in these texts, lists of texts, ... has none."""
    if isinstance(texts, str):
        try:
            texts.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"the text has a lone surrogate, {texts[error.start]!a}, at {error.start}, and so is no Unicode: "
                "decode its bytes with errors='replace', or give them to encode_bytes"
            ) from cause
    elif isinstance(texts, list | tuple):
        for text in texts:
            _refuse_surrogates(text, cause)
