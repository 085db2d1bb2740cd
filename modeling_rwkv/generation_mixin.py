"""What `generate` of transformers has to know about a recurrent state."""

import functools
import inspect
from typing import Any

from torch import Tensor
from transformers import GenerationConfig, GenerationMixin

from modeling_rwkv.cache import RwkvCache
from modeling_rwkv.decoding import held
from modeling_rwkv.static_cache import RwkvStaticCache
from modeling_rwkv.stopping import StopStringMixin


class RwkvGenerationMixin(StopStringMixin):
    """`generate`, which continues from an :class:`RwkvCache`.

    ``cache_implementation="static"`` lets the state be written over, see :class:`RwkvStaticCache`. While it runs,
    weights may be edited in place; what is replaced, and hooks that are added, count from the next call on.
    """

    @functools.wraps(inspect.unwrap(GenerationMixin.generate))
    def generate(self, *args: Any, **kwargs: Any) -> Any:
        with held(self):
            return super().generate(*args, **kwargs)

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> None:
        past = model_kwargs.get("past_key_values")
        if isinstance(past, RwkvStaticCache):  # the model may have changed since
            past.plan = None
        is_static = generation_config.cache_implementation == "static" and generation_config.use_cache is not False
        if is_static and past is None:
            model_kwargs["past_key_values"] = RwkvStaticCache()
        else:
            super()._prepare_cache_for_generation(generation_config, model_kwargs, *args, **kwargs)

    def _update_model_kwargs_for_generation(
        self, outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any
    ) -> dict[str, Any]:
        if outputs.get("past_key_values") is not None:  # what comes next is one token a row, and no padding
            model_kwargs = {
                name: x for name, x in model_kwargs.items() if name not in ("attention_mask", "position_ids")
            }
        return super()._update_model_kwargs_for_generation(outputs, model_kwargs, *args, **kwargs)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        past_key_values: RwkvCache | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Continuing from a cache, `generate` takes the whole text so far or only what is new, whichever is given.

        Without a mask over more than the given ids, by which transformers knows that they are new (and then gives no
        ``next_sequence_length``), it assumes the whole text; here the cache knows whether they begin with what it has
        read. After the first tokens it takes the last one of each row, and there is nothing to prepare.
        """
        is_next = not is_first_iteration and next_sequence_length == 1 and isinstance(past_key_values, RwkvCache)
        if is_next and attention_mask is None:
            kwargs.pop("labels", None)  # of the prompt
            return {"input_ids": input_ids[:, -1:], "past_key_values": past_key_values, **kwargs}
        if is_first_iteration and next_sequence_length is not None and isinstance(past_key_values, RwkvCache):
            next_sequence_length = past_key_values.unread(input_ids, attention_mask, inputs_embeds)
        return super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            attention_mask=attention_mask,
            inputs_embeds=inputs_embeds,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
