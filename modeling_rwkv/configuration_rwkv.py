"""Configuration of RWKV-4, in the field names of the checkpoints on the Hugging Face Hub."""

import copy
import os
from typing import Any, ClassVar

from transformers import PretrainedConfig

from modeling_rwkv.sharing import CONFIG_FIELDS, UploadsHubFile, copy_hub_file, is_shared


class RwkvConfig(UploadsHubFile, PretrainedConfig):
    """Sizes and settings of an RWKV-4 model.

    Args:
        vocab_size: number of token ids that the embedding and the head know.
        context_length: length in tokens of the sequences seen in training. Only advice: the model runs at any length.
        hidden_size: channels C of the residual stream.
        num_hidden_layers: number of blocks L.
        attention_hidden_size: channels of the WKV operator; ``hidden_size`` unless given.
        intermediate_size: channels inside channel mixing; ``4 * hidden_size`` unless given.
        layer_norm_epsilon: epsilon of every layer norm.
        bos_token_id, eos_token_id: beginning and end of text.
        rescale_every: in float16, the residual stream is halved every so many blocks (by scaling activations at run
            time; weights stay as they are), so that it stays in range. 0 or less: never.
        tie_word_embeddings: share the weights of embedding and head.
        use_cache: return the recurrent state from ``forward`` outside training.
        initial_state: sequences begin with a state that is part of the weights, see ``RwkvModel.set_initial_state``.

    Raises:
        ValueError: a size that is not a positive whole number, or a ``rescale_every`` that is not a whole number.
    """

    model_type = "rwkv"
    attribute_map = {"max_position_embeddings": "context_length"}
    keys_to_ignore_at_inference = ["past_key_values"]
    _registered: ClassVar[bool] = False

    def __init__(
        self,
        vocab_size: int = 50277,
        context_length: int = 1024,
        hidden_size: int = 4096,
        num_hidden_layers: int = 32,
        attention_hidden_size: int | None = None,
        intermediate_size: int | None = None,
        layer_norm_epsilon: float = 1e-5,
        bos_token_id: int | None = 0,
        eos_token_id: int | list[int] | None = 0,
        rescale_every: int = 6,
        tie_word_embeddings: bool = False,
        use_cache: bool = True,
        initial_state: bool = False,
        **kwargs: Any,
    ) -> None:
        self.vocab_size = vocab_size
        self.context_length = context_length
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.attention_hidden_size = hidden_size if attention_hidden_size is None else attention_hidden_size
        self.intermediate_size = 4 * hidden_size if intermediate_size is None else intermediate_size
        self.layer_norm_epsilon = layer_norm_epsilon
        self.rescale_every = rescale_every
        self.use_cache = use_cache
        self.initial_state = initial_state
        sizes = (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "attention_hidden_size",
            "intermediate_size",
        )
        for name in sizes:
            size = getattr(self, name)
            if type(size) is not int or size < 1:
                raise ValueError(f"{name} is {size!r}: expected a positive whole number")
        if type(rescale_every) is not int:
            raise ValueError(f"rescale_every is {rescale_every!r}: expected a whole number, 0 for never")
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Save what programs need that do not know this package with every model from now on, see sharing.py.

        The way of transformers, which would copy source files of this package.
        """
        cls._registered = True

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> None:
        if self._registered or is_shared(getattr(self, "auto_map", None)):
            for name, value in copy.deepcopy(CONFIG_FIELDS).items():
                setattr(self, name, value)
            copy_hub_file(save_directory)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)
