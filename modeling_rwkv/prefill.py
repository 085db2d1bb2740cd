"""Long prompts, read in the memory of a piece: all that an RNN needs of the text before it is a state.

The rule: at most ``model.prefill_tokens`` positions at once, of all rows together, in pieces of equal length. What
fits into one is read in one pass. On a CPU pieces of 1,024 to 4,096 rows are read faster than the whole, as more of
what they need stays in caches: by 5 to 30% at 4,096 to 16,384 tokens of the model in the box and of 768 channels.

`RwkvForCausalLM.forward` reads so where only memory can tell the difference: without autograd, where logits of a
number of last positions are asked for, as `generate` does, and no hidden states, in a model that nobody watches by
hooks or compiles. Rows of several sequences take one pass, too. Weights that are kept elsewhere (accelerate's
offloading) are fetched once a piece.

Symbols: B rows of T positions, C channels.
"""

import math
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor
from torch.nn.modules import module as torch_module
from transformers.modeling_outputs import BaseModelOutputWithPast

from modeling_rwkv.cache import RwkvCache
from modeling_rwkv.packing import arrange
from rwkv_kernels.wkv4_native import are_at_hand


def last_piece(
    model: Any, input_ids: Tensor | None, given: dict[str, Any], keep: int | Tensor
) -> BaseModelOutputWithPast:
    """What ``model.rwkv(input_ids, **given)`` returns; of its hidden states perhaps only the last ``keep`` or more."""
    begin = _length_to_part(model, input_ids, given, keep)
    if begin == 0:
        return model.rwkv(input_ids, **given, return_dict=True)
    tokens = given["inputs_embeds"] if input_ids is None else input_ids
    rows, length = tokens.shape[:2]
    layout, valid = arrange((rows, length), given["attention_mask"], given["position_ids"])
    if layout.cu_seqlens is not None and len(layout.cu_seqlens) > rows + 1:  # rows of several sequences
        return model.rwkv(input_ids, **given, return_dict=True)
    past = RwkvCache() if given["past_key_values"] is None else given["past_key_values"]
    state = RwkvCache()
    state.layers = past.layers
    read(model, tokens[:, :begin], state, valid)
    ids, embeds = _ids_or_embeds(tokens[:, begin:])
    mask = None if valid is None else valid[:, begin:]
    rest = {"inputs_embeds": embeds, "attention_mask": mask, "position_ids": None, "past_key_values": state}
    outputs = model.rwkv(ids, **given | rest, return_dict=True)
    if outputs.past_key_values is not None:  # the cache that was given advances once, when all has been read
        outputs.past_key_values = past.advance(state.layers, length, input_ids, valid)
    return outputs


@torch.no_grad()
def read(model: Any, tokens: Tensor, state: RwkvCache, valid: Tensor | None = None, progress: bool = False) -> None:
    """Let ``state`` read on, piece by piece.

    Args:
        model: an `RwkvForCausalLM`.
        tokens: (B, T) int64, or embeddings (B, T, C).
        state: of B rows, or empty.
        valid: (B, >= T) bool, False where padding; None for none.
        progress: show a bar on stderr while there are several pieces to read.
    """
    rows, length = tokens.shape[:2]
    step = _piece_length(model, rows, length)
    hidden = not progress or step >= length
    with tqdm(total=length, desc="reading", unit=" tokens", unit_scale=True, leave=False, disable=hidden) as bar:
        for begin in range(0, length, step):
            piece = slice(begin, min(begin + step, length))
            mask = None if valid is None else valid[:, piece]
            if mask is None or bool(mask.any()):
                ids, embeds = _ids_or_embeds(tokens[:, piece])
                model.rwkv(ids, attention_mask=mask, past_key_values=state, inputs_embeds=embeds, use_cache=True)
            bar.update(piece.stop - begin)


def length_before_last_piece(model: Any, tokens: Tensor, keep: int = 1) -> int:
    """How many positions of ``tokens`` (B, T, ...) come before the last piece, which has ``keep`` or more of them."""
    rows, length = tokens.shape[:2]
    step = _piece_length(model, rows, length)
    return max(0, length - keep) // step * step


def _piece_length(model: Any, rows: int, length: int) -> int:
    most = model.prefill_tokens
    if most is None or rows * length <= most:
        return max(1, length)
    return math.ceil(length / math.ceil(length / max(1, most // rows)))


def _ids_or_embeds(tokens: Tensor) -> tuple[Tensor | None, Tensor | None]:
    return (None, tokens) if tokens.is_floating_point() else (tokens, None)


def _length_to_part(model: Any, ids: Tensor | None, given: dict[str, Any], keep: int | Tensor) -> int:
    """`length_before_last_piece` of what is given; 0 where more than memory could tell the difference."""
    embeds, past = given["inputs_embeds"], given["past_key_values"]
    if torch.is_grad_enabled() or not isinstance(keep, int) or keep <= 0 or (ids is None) == (embeds is None):
        return 0
    if not isinstance(past, RwkvCache | None) or not are_at_hand(ids, embeds, given["attention_mask"]):
        return 0
    begin = length_before_last_piece(model, embeds if ids is None else ids, keep)
    if begin == 0 or any(given[name] is not None for name in ("cu_seq_lens_q", "cu_seq_lens_k", "seq_idx")):
        return 0
    hidden_states = given["output_hidden_states"]
    hidden_states = model.config.output_hidden_states if hidden_states is None else hidden_states
    return 0 if hidden_states or _is_watched(model.rwkv) else begin


def _is_watched(model: torch.nn.Module) -> bool:
    hooks = [torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks]
    return any(hooks) or any(x._forward_hooks or x._forward_pre_hooks for x in model.modules())
