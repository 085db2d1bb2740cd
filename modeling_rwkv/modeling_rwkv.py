"""RWKV-4 for transformers, in the words of the paper.

Peng et al. 2023, "RWKV: Reinventing RNNs for the Transformer Era", arXiv:2305.13048. Parameter names are those of the
checkpoints on the Hugging Face Hub.

Symbols: B batch, T positions, C hidden size, A attention hidden size, V vocabulary, N sequences.
"""

import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import can_return_tuple

from modeling_rwkv.cache import LayerState, RwkvCache
from modeling_rwkv.chunks import loss_by_chunks
from modeling_rwkv.configuration_rwkv import RwkvConfig
from modeling_rwkv.decoding import next_token
from modeling_rwkv.generation_mixin import RwkvGenerationMixin
from modeling_rwkv.initial_state import RwkvInitialState, read_initial_state
from modeling_rwkv.initialization import init_channel_mix, init_linear, init_time_mix, linear
from modeling_rwkv.loss import chunked_loss
from modeling_rwkv.packing import IGNORED, Layout, arrange
from modeling_rwkv.prefill import last_piece
from rwkv_kernels.mixing import gate, shift_and_mix, squared_relu
from rwkv_kernels.wkv4 import wkv4


class RwkvLayerNorm(nn.LayerNorm):
    """A layer norm whose parameters may be of more bits than what it is given, as beside quantized matrices."""

    def forward(self, x: Tensor) -> Tensor:
        """x: (..., C) to the same, normed in the widest dtype of the parameters."""
        wide = torch.promote_types(self.weight.dtype, self.bias.dtype)
        parameters = self.weight.to(wide), self.bias.to(wide)
        return nn.functional.layer_norm(x.to(wide), self.normalized_shape, *parameters, self.eps).to(x.dtype)


class RwkvTimeMix(nn.Module):
    """Attention: receptance gates an exponentially decaying average of values, weighted by keys."""

    def __init__(self, config: RwkvConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        hidden_size, attention_size = config.hidden_size, config.attention_hidden_size
        self.time_decay = nn.Parameter(torch.empty(attention_size))
        self.time_first = nn.Parameter(torch.empty(attention_size))
        self.time_mix_key = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_mix_value = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_mix_receptance = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.key = linear(hidden_size, attention_size, init_gain=0)
        self.value = linear(hidden_size, attention_size)
        self.receptance = linear(hidden_size, attention_size, init_gain=0)
        self.output = linear(attention_size, hidden_size, init_gain=0)

    def forward(
        self, x: Tensor, layout: Layout, previous: Tensor | None, state: Tensor | None, scale: float
    ) -> tuple[Tensor, Tensor]:
        """x: (B, T, C) to the same and the WKV state (N, 3, A); the output is multiplied by ``scale``."""
        mixes = self.time_mix_key, self.time_mix_value, self.time_mix_receptance
        x_key, x_value, x_receptance = shift_and_mix(x, previous, layout, *mixes)
        key = self.key(x_key)
        value = self.value(x_value).to(key.dtype)  # under autocast, quantised layers need not agree
        if state is not None:  # which may come from this model in another dtype
            state = state.to(torch.promote_types(key.dtype, torch.float32))
        wkv, state = wkv4(self.time_decay, self.time_first, key, value, state, layout.cu_seqlens)
        return self.output(gate(self.receptance(x_receptance), wkv, scale)), state


class RwkvChannelMix(nn.Module):
    """The feed-forward half: squared ReLU of the key, gated by receptance."""

    def __init__(self, config: RwkvConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        hidden_size, intermediate_size = config.hidden_size, config.intermediate_size
        self.time_mix_key = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.time_mix_receptance = nn.Parameter(torch.empty(1, 1, hidden_size))
        self.key = linear(hidden_size, intermediate_size)
        self.receptance = linear(hidden_size, hidden_size, init_gain=0)
        self.value = linear(intermediate_size, hidden_size, init_gain=0)

    def forward(self, x: Tensor, layout: Layout, previous: Tensor | None, scale: float) -> Tensor:
        """x: (B, T, C) to the same; the output is multiplied by ``scale``."""
        x_key, x_receptance = shift_and_mix(x, previous, layout, self.time_mix_key, self.time_mix_receptance)
        value = self.value(squared_relu(self.key(x_key), scale))
        return gate(self.receptance(x_receptance), value)


class RwkvBlock(GradientCheckpointingLayer):
    """Time mixing, then channel mixing, each after a layer norm and added to the residual stream."""

    def __init__(self, config: RwkvConfig, layer_idx: int) -> None:
        super().__init__()
        self.layer_idx = layer_idx
        self.config = config
        if layer_idx == 0:
            self.pre_ln = RwkvLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.ln1 = RwkvLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.ln2 = RwkvLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.attention = RwkvTimeMix(config, layer_idx)
        self.feed_forward = RwkvChannelMix(config, layer_idx)

    def forward(
        self,
        x: Tensor,
        layout: Layout,
        time_mix: Tensor | None = None,
        channel_mix: Tensor | None = None,
        wkv: Tensor | None = None,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x: (B, T, C), and the parts of a LayerState with N rows; returns the same four, after the last tokens."""
        scale = _scale(self.config, self.layer_idx, x.dtype)
        if self.layer_idx == 0:
            x = self.pre_ln(x)
        normed = self.ln1(x)
        mixed, wkv = self.attention(normed, layout, time_mix, wkv, scale)
        time_mix = layout.last(normed, time_mix)
        x = x + mixed
        normed = self.ln2(x)
        x = x + self.feed_forward(normed, layout, channel_mix, scale)
        x = _scaled(x, _scale(self.config, self.layer_idx + 1, x.dtype) / scale)
        return x, time_mix, layout.last(normed, channel_mix), wkv


class RwkvPreTrainedModel(PreTrainedModel):
    config_class = RwkvConfig
    base_model_prefix = "rwkv"
    _input_embed_layer = "embeddings"
    supports_gradient_checkpointing = True
    _is_stateful = True
    _no_split_modules = ["RwkvBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _keep_in_fp32_modules_strict = ["time_decay", "time_first", "initial_state"]

    def __init__(self, config: RwkvConfig, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)
        if getattr(config, "quantization_config", None) is not None:  # bits are saved on matrices, not on vectors
            self._keep_in_fp32_modules_strict = [*self._keep_in_fp32_modules_strict, "time_mix", "ln"]

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        cls.config_class.register_for_auto_class()

    def set_initial_state(self, state: RwkvCache | str | os.PathLike | None) -> None:
        """Begin every sequence with ``state`` of one row, the file of one that :meth:`RwkvCache.save` wrote, or empty.

        It becomes a part of the model, ``initial_state``, that is saved and loaded with it, and trained where the
        embeddings are. A cache given as ``past_key_values`` comes before it.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is no state, or has several rows, or is of another model.
        """
        model = self.base_model
        if state is None:
            model.initial_state = None
        else:
            state = read_initial_state(state, model)
            like = model.embeddings.weight
            with torch.inference_mode(False):  # whose tensors could not be trained
                model.initial_state = RwkvInitialState(model.config)
                model.initial_state.set(state)
                model.initial_state.to("cpu" if like.is_meta else like.device).requires_grad_(like.requires_grad)
        model.config.initial_state = self.config.initial_state = state is not None

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The initialisation of the paper, see initialization.py."""
        if isinstance(module, RwkvTimeMix):
            init_time_mix(module, self.config.num_hidden_layers)
        elif isinstance(module, RwkvChannelMix):
            init_channel_mix(module, self.config.num_hidden_layers)
        elif isinstance(module, nn.Linear):
            init_linear(module)
        elif isinstance(module, nn.Embedding):
            init.uniform_(module.weight, -1e-4, 1e-4)
        elif isinstance(module, RwkvInitialState):
            module.set(None)
        else:
            super()._init_weights(module)


class RwkvModel(RwkvPreTrainedModel):
    """Embeddings, blocks and the last layer norm."""

    def __init__(self, config: RwkvConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.hidden_size)
        self.blocks = nn.ModuleList(RwkvBlock(config, idx) for idx in range(config.num_hidden_layers))
        self.ln_out = RwkvLayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.initial_state = RwkvInitialState(config) if config.initial_state else None
        self.gradient_checkpointing = False
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RwkvCache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Read tokens, from nothing or from where ``past_key_values`` stopped.

        Args:
            input_ids: (B, T) int64; or
            inputs_embeds: (B, T, C).
            attention_mask: (B, T) or (B, past + T), 0 where padding; anywhere, in any number. Padding is not read:
                a padded row gives what the row alone gives, and zeros at its padding.
            position_ids: (B, T) or (1, T). Only their restarts matter: a new sequence begins where they do not rise.
            past_key_values: the state to continue from, with B rows.
            use_cache: return the state after the last token; by default as the config says, and not in training.
            output_hidden_states: return the input of every block and the output, each (B, T, C).
            cu_seq_lens_q, cu_seq_lens_k: (n + 1,) cumulative lengths of sequences packed into a batch of one row.
            seq_idx: (B, T) number of the sequence that each token belongs to.

        Raises:
            ValueError: an argument that does not fit the others; names it.
        """
        if "state" in kwargs:
            raise ValueError("state= is not an argument of this RWKV: pass and read past_key_values, an RwkvCache")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embeddings(input_ids)
        use_cache = (self.config.use_cache and not self.training) if use_cache is None else use_cache
        output_hidden_states = (
            self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        )
        rows, length, _ = inputs_embeds.shape
        if length == 0:
            raise ValueError("there are no tokens to read: give at least one per row")
        cu_seq_lens = cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
        layout, valid = arrange((rows, length), attention_mask, position_ids, cu_seq_lens, seq_idx)
        layout = layout.to(inputs_embeds.device)
        past = RwkvCache() if past_key_values is None else self._checked(past_key_values, rows)

        x = layout.pack(inputs_embeds)
        layers: list[LayerState] = []
        hidden_states: list[Tensor] = []
        for idx, block in enumerate(self.blocks):
            if output_hidden_states:
                hidden_states.append(layout.unpack(x) / _scale(self.config, idx, x.dtype))
            state = self._begin(layout, past, idx, rows, x.dtype)
            x, *after = block(x, layout, *state)
            if use_cache:
                layers.append(LayerState(*map(layout.end, after)))
        x = layout.unpack(self.ln_out(x))
        return BaseModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past.advance(layers, length, input_ids, valid) if use_cache else None,
            hidden_states=(*hidden_states, x) if output_hidden_states else None,
        )

    def _begin(self, layout: Layout, past: RwkvCache, idx: int, rows: int, dtype: torch.dtype) -> list[Tensor]:
        """The parts of a LayerState of block ``idx`` before each sequence, (N, ...); none where all are empty."""
        if self.initial_state is None:
            return [layout.begin(part) for part in past.layers[idx]] if past.layers else []
        new = self.initial_state(idx, dtype)
        old = past.layers[idx] if past.layers else [part.expand(rows, *part.shape[1:]) for part in new]
        return [layout.begin(part, fresh) for part, fresh in zip(old, new, strict=True)]

    def _checked(self, cache: RwkvCache, rows: int) -> RwkvCache:
        """``cache``, if this model with a batch of ``rows`` can continue from it."""
        if not isinstance(cache, RwkvCache):
            raise ValueError(
                f"past_key_values is a {type(cache).__name__}: an RWKV continues from an RwkvCache, "
                "as a call with use_cache=True returns it"
            )
        if not cache.layers:
            return cache
        cache.check_sizes(self.config, "past_key_values")
        if cache.batch_size != rows:
            raise ValueError(
                f"past_key_values has {cache.batch_size} rows but the batch has {rows}: "
                "use its batch_select_indices(), or batch_repeat_interleave(n) for n beams or sequences of each row"
            )
        return cache


class RwkvForCausalLM(RwkvGenerationMixin, RwkvPreTrainedModel):
    """RWKV with a language modelling head.

    native_decoding: compute the next token natively where that can be, see decoding.py; False: module by module.
    prefill_tokens: how many tokens of a prompt, of all rows together, are read at once, see prefill.py; None: all.
    """

    native_decoding = True
    prefill_tokens: int | None = 4096
    _tied_weights_keys = {"head.weight": "rwkv.embeddings.weight"}

    def __init__(self, config: RwkvConfig) -> None:
        super().__init__(config)
        self.rwkv = RwkvModel(config)
        self.head = linear(config.hidden_size, config.vocab_size, init_gain=0.5)
        self.post_init()

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def set_output_embeddings(self, new_embeddings: nn.Linear) -> None:
        self.head = new_embeddings

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: RwkvCache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        cu_seq_lens_q: Tensor | None = None,
        cu_seq_lens_k: Tensor | None = None,
        seq_idx: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        skip_logits: bool = False,
        chunk_length: int | None = None,
        carry_gradients: bool = True,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Logits (B, T, V) of the next token; the arguments are those of :meth:`RwkvModel.forward`, and:

        Args:
            labels: (B, T) int64, the input ids, or -100 where a token does not count. Every token is scored by the one
                before it in its sequence, across padding too; the first of a sequence is not scored.
            logits_to_keep: the number of last positions to compute logits for, 0 for all, or their indices (n,).
            skip_logits: compute the loss in chunks and return no logits: the same loss in a fraction of the memory,
                at no cost for labels of -100; see :func:`modeling_rwkv.loss.chunked_loss`.
            chunk_length: compute the loss, and later its gradients, so many tokens at a time, in the memory of these;
                returns nothing else. See :func:`modeling_rwkv.chunks.loss_by_chunks`.
            carry_gradients: let gradients pass from one chunk to those before it, as without chunks; or cut them off,
                as truncated backpropagation through time does.
            kwargs: reach the loss, among them ``num_items_in_batch``, by which their sum is divided instead of their
                number (the Trainer counts all labels but those of first columns, so first tokens after left padding
                should be -100).

        Raises:
            ValueError: an argument that does not fit the others; names it.
        """
        inputs = {
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "cu_seq_lens_q": cu_seq_lens_q,
            "cu_seq_lens_k": cu_seq_lens_k,
            "seq_idx": seq_idx,
        }
        options = {
            "past_key_values": past_key_values,
            "use_cache": use_cache,
            "output_hidden_states": output_hidden_states,
        }
        others = inputs_embeds, labels, chunk_length, skip_logits or None, kwargs.get("state")
        if all(x is None for x in others):
            asked = input_ids, attention_mask, past_key_values, use_cache, output_hidden_states, logits_to_keep
            if (token := next_token(self, *asked)) is not None:
                return token
        kwargs["vocab_size"] = self.config.vocab_size
        if labels is not None:
            tokens = _given(input_ids, inputs_embeds)
            layout = _layout_of(labels, tokens, **inputs)
            if kwargs.get("shift_labels") is None:
                kwargs["shift_labels"] = layout.next_labels(labels)
        elif skip_logits or chunk_length is not None:
            raise ValueError("without labels there is no loss, and so nothing to compute: give labels")
        if chunk_length is not None:
            _check_that_none_is_given(**options, logits_to_keep=logits_to_keep)
            tokens, skip_logits = layout.pack(tokens).flatten(0, 1), True
            if len(tokens) > 0:
                return CausalLMOutputWithPast(self._chunked(layout, tokens, chunk_length, carry_gradients, **kwargs))
        given = {"inputs_embeds": inputs_embeds} | inputs | options | kwargs
        outputs = last_piece(self, input_ids, given, keep=logits_to_keep if labels is None else 0)
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        loss, logits = self._scored(outputs.last_hidden_state[:, kept], labels, skip_logits, **kwargs)
        return CausalLMOutputWithPast(loss, logits, outputs.past_key_values, outputs.hidden_states)

    def _scored(
        self, x: Tensor, labels: Tensor | None, skip_logits: bool, **kwargs: Any
    ) -> tuple[Tensor | None, Tensor | None]:
        """The loss where there are labels, and the logits, unless they are skipped, of ``x`` (B, T, C)."""
        if skip_logits:
            return chunked_loss(self.loss_function, self.head, x, **kwargs), None
        logits = self.head(x)
        return None if labels is None else self.loss_function(logits=logits, labels=labels, **kwargs), logits

    def _chunked(
        self,
        layout: Layout,
        tokens: Tensor,
        chunk_length: int,
        carry_gradients: bool,
        shift_labels: Tensor,
        num_items_in_batch: Tensor | int | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """The loss of ids (M, 1), or embeddings (M, C), laid end to end as ``layout`` does, read in chunks."""
        labels = layout.pack(shift_labels[..., None]).flatten(0, 1)
        items = (labels != IGNORED).sum() if num_items_in_batch is None else num_items_in_batch
        rows, length = shift_labels.shape
        bounds = torch.arange(rows + 1) * length if layout.cu_seqlens is None else layout.cu_seqlens

        def read(tokens: Tensor, labels: Tensor, bounds: Tensor, past: RwkvCache) -> tuple[Tensor, RwkvCache]:
            given = {"inputs_embeds": tokens[None]} if tokens.is_floating_point() else {"input_ids": tokens.T}
            outputs = self.rwkv(**given, cu_seq_lens_q=bounds, past_key_values=past, use_cache=True, return_dict=True)
            loss = chunked_loss(self.loss_function, self.head, outputs.last_hidden_state, labels.T, items, **kwargs)
            return loss, outputs.past_key_values

        return loss_by_chunks(self, read, tokens, labels, bounds, chunk_length, carry_gradients)


def _check_that_none_is_given(**options: Any) -> None:
    if given := [name for name, x in options.items() if x]:
        raise ValueError(f"chunk_length gives the loss and nothing else: leave out {', '.join(given)}")


def _given(input_ids: Tensor | None, inputs_embeds: Tensor | None) -> Tensor:
    """Ids (B, T, 1) or embeddings (B, T, C), whichever there are."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("give either input_ids or inputs_embeds")
    return input_ids[..., None] if inputs_embeds is None else inputs_embeds  # type: ignore[index]


def _layout_of(
    labels: Tensor,
    tokens: Tensor,
    attention_mask: Tensor | None,
    position_ids: Tensor | None,
    cu_seq_lens_q: Tensor | None,
    cu_seq_lens_k: Tensor | None,
    seq_idx: Tensor | None,
) -> Layout:
    """The layout of a batch of ``tokens`` (B, T, ...), for which ``labels`` must be."""
    if labels.shape != tokens.shape[:2]:
        raise ValueError(
            f"labels have shape {tuple(labels.shape)}, the tokens {tuple(tokens.shape[:2])}: give one label for each"
        )
    cu_seq_lens = cu_seq_lens_k if cu_seq_lens_q is None else cu_seq_lens_q
    return arrange((labels.shape[0], labels.shape[1]), attention_mask, position_ids, cu_seq_lens, seq_idx)[0]


def _scale(config: RwkvConfig, layer_idx: int, dtype: torch.dtype) -> float:
    """The power of two by which the residual stream before a block is scaled, to stay in the range of float16."""
    return 0.5 ** (layer_idx // config.rescale_every) if dtype == torch.float16 and config.rescale_every > 0 else 1.0


def _scaled(x: Tensor, scale: float) -> Tensor:
    return x if scale == 1 else x * scale
