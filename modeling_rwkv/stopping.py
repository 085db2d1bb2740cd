"""Generation that stops at the stop strings of a model's folder without being told of its tokenizer."""

import copy
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from transformers import AutoTokenizer, GenerationConfig, GenerationMixin, PreTrainedTokenizerBase
from transformers.generation import StoppingCriteriaList, StopStringCriteria

KEPT = 8  # sets of stop strings
PLACE = ("revision", "subfolder", "cache_dir")


class StopStringMixin(GenerationMixin):
    """`generate`, which looks up the tokenizer that transformers needs to find stop strings.

    They are those of `generation_config.json`, where a chat template has its own; `stop_strings=None` goes past them.
    """

    _place: Mapping[str, Any] = {}  # of the files at `name_or_path`, as `from_pretrained` was told

    @classmethod
    def from_pretrained(cls, *args: Any, **kwargs: Any) -> Any:
        found = super().from_pretrained(*args, **kwargs)
        model = found[0] if isinstance(found, tuple) else found
        model._place = {name: kwargs[name] for name in PLACE if kwargs.get(name) is not None}
        return found

    def _get_stopping_criteria(
        self,
        generation_config: GenerationConfig,
        stopping_criteria: StoppingCriteriaList | None,
        tokenizer: PreTrainedTokenizerBase | None = None,
        **kwargs: Any,
    ) -> StoppingCriteriaList:
        if tokenizer is not None:
            return super()._get_stopping_criteria(generation_config, stopping_criteria, tokenizer=tokenizer, **kwargs)
        rest = copy.copy(generation_config)
        rest.stop_strings = None
        found = super()._get_stopping_criteria(rest, stopping_criteria, **kwargs)
        if generation_config.stop_strings:
            found.append(self._stop_at(generation_config.stop_strings))
        return found

    def _stop_at(self, stop_strings: str | list[str]) -> StopStringCriteria:
        """The last few are kept: each goes through the whole vocabulary, a third of a second for World models."""
        key = stop_strings if isinstance(stop_strings, str) else tuple(stop_strings)
        found = self._stops.get(key)
        if found is None:
            found = StopStringCriteria(self._own_tokenizer, stop_strings)
            if len(self._stops) >= KEPT:
                del self._stops[next(iter(self._stops))]
            self._stops[key] = found
        return found

    @cached_property
    def _stops(self) -> dict[str | tuple[str, ...], StopStringCriteria]:
        return {}

    @cached_property
    def _own_tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer beside the weights.

        Raises:
            ValueError: there is none.
        """
        name = self.config.name_or_path
        try:
            if not name:
                raise ValueError("this model was not loaded from anywhere")
            tokenizer = AutoTokenizer.from_pretrained(name, **self._place)
            if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
                raise ValueError("transformers made up a tokenizer without a vocabulary")
        except (OSError, ValueError) as error:
            raise ValueError(
                f"generation shall end at stop strings, but there is no tokenizer at {name!r} to find them with: "
                "give tokenizer=, or stop_strings=None to go past them"
            ) from error
        return tokenizer
