"""Text as it is generated, in whole characters."""

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer


class TextPieces(BaseStreamer):
    """Gives ``write`` the text of every token as it comes, and never half a character.

    What is put first is the prompt, whose text is not written, but for a character that it leaves unfinished.
    Together the pieces are what decoding all tokens at once gives. Only the tokens since the last piece but one are
    decoded: tokenizers may treat the beginning of a text in a special way, so no piece is decoded alone.

    first_token_at: when the first one after the prompt came, by ``time.perf_counter``.
    """

    def __init__(self, tokenizer: Any, write: Callable[[str], object]) -> None:
        self._tokenizer, self._write = tokenizer, write
        self._ids: list[int] = []
        self._begin = self._written = 0
        self.first_token_at: float | None = None

    @property
    def is_whole(self) -> bool:
        """Whether the text of every token is written."""
        return self._written == len(self._ids)

    def put(self, value: Tensor) -> None:
        is_prompt = not self._ids
        self._ids += value.flatten().tolist()
        if is_prompt:
            self._written = len(self._ids)
        else:
            self.first_token_at = self.first_token_at or time.perf_counter()
            self._write_on(is_end=False)

    def end(self) -> None:
        self._write_on(is_end=True)

    def _write_on(self, is_end: bool) -> None:
        before = _decode(self._tokenizer, self._ids[self._begin : self._written])
        text = _decode(self._tokenizer, self._ids[self._begin :])
        # A character of several tokens is U+FFFD until its last byte is there, at the end of ``before``, too.
        if text != before and (is_end or not text.endswith("\ufffd")):
            self._begin, self._written = self._written, len(self._ids)
            while not text.startswith(before):
                before = before[:-1]
            self._write(text[len(before) :])


def _decode(tokenizer: Any, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
