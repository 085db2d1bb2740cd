"""The recurrent state of an RWKV as a `transformers` cache: constant size, however long the text.

Symbols: B rows of the batch, C channels of the residual stream, A channels of the WKV operator.
"""

import copy
import hashlib
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor
from transformers import Cache, PreTrainedModel
from transformers.utils import logging

from modeling_rwkv.configuration_rwkv import RwkvConfig
from rwkv_kernels.decode_weights import Stack

logger = logging.get_logger(__name__)

_FORMAT = "rwkv-4-cache"
_HASH_FACTOR = 6364136223846793005  # Knuth's MMIX multiplier: odd, so that powers of it never vanish


class LayerState(NamedTuple):
    """What one block remembers.

    time_mix: (B, C), the last input of time mixing; channel_mix: (B, C), the last input of channel mixing, both in
    the dtype of the model; wkv: (B, 3, A) float32 (float64 in a float64 model), see `rwkv_kernels.wkv4`.
    """

    time_mix: Tensor
    channel_mix: Tensor
    wkv: Tensor


class RwkvCache(Cache):
    """The state after the tokens read so far: one :class:`LayerState` per block, none before the first token.

    It is passed and returned as ``past_key_values``. A forward pass under ``torch.no_grad()`` updates the cache that
    it was given, like any cache of transformers; a forward pass that records gradients returns a new one and leaves
    the given one as it was (one that was made under ``torch.inference_mode()`` can't be used there: PyTorch's rule).
    ``clone()`` keeps a state to come back to: reading cannot be undone.

    `generate` goes on from it with the tokens that are new, or with the whole text so far, which it tells apart by
    what the cache has read. An ``attention_mask`` that is longer than the given ids says that all of them are new. One
    that is missing is guessed by transformers: a pad token among the new ones is padding. A mask of ones says that it
    is text.
    """

    is_compileable = False
    is_croppable = False
    is_sliding: list[bool] = []
    _layers: list[LayerState]
    _stack: Stack | None

    def __init__(self) -> None:
        super().__init__(layers=[])
        self.seen_tokens = 0
        self.fingerprint: Tensor | None = None

    def __repr__(self) -> str:
        return f"RwkvCache(layers={len(self._states())}, batch_size={self.batch_size}, seen_tokens={self.seen_tokens})"

    @property
    def layers(self) -> list[LayerState]:
        """One state for each block: a list that may be edited."""
        if self._stack is not None:  # from now on somebody else may hold, and edit, what is in the list
            self.layers = [LayerState(*map(torch.clone, state)) for state in self._states()]
        return self._layers

    @layers.setter
    def layers(self, layers: list[LayerState]) -> None:
        self._layers, self._stack = layers, None

    @property
    def stack(self) -> Stack | None:
        """The states in one piece, as kernels of the next token read them; None if they don't fit together."""
        if self._stack is not None:
            return self._stack
        alike = len({tuple((part.dtype, part.device) for part in layer) for layer in self._layers}) == 1
        return Stack.of(self._layers) if alike and _fit_together(self._layers) else None

    @stack.setter
    def stack(self, stack: Stack) -> None:
        self._layers, self._stack = [], stack

    def _states(self) -> list[LayerState]:
        """``layers``, to look at; they may be views."""
        return self._layers if self._stack is None else unstacked(self._stack)

    @property
    def batch_size(self) -> int:
        """Number of rows, or -1 before the first token."""
        if self._stack is not None:
            return self._stack.wkv.shape[1]
        return self._layers[0].wkv.shape[0] if self._layers else -1

    @property
    def is_initialized(self) -> bool:
        return self.batch_size >= 0

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Number of positions read so far, padding included."""
        return self.seen_tokens

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: a recurrent state has no maximal length."""
        return -1

    get_max_cache_shape = get_max_length  # its name in older transformers

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.is_initialized

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.seen_tokens + query_length, 0

    def advance(
        self, layers: list[LayerState] | None, tokens: int, input_ids: Tensor | None, valid: Tensor | None
    ) -> "RwkvCache":
        """The cache after one more pass over ``tokens`` positions: itself without autograd, a new one with it.

        layers: after it; None where they are in ``stack`` already, without autograd.
        input_ids: (B, tokens) or None where only embeddings are known; valid: (B, tokens) bool, None for all.
        """
        cache = RwkvCache() if torch.is_grad_enabled() else self
        cache.fingerprint = _fingerprint(self.fingerprint, input_ids, valid) if input_ids is not None else None
        cache.seen_tokens = self.seen_tokens + tokens
        if layers is not None:
            cache.layers = layers
        return cache

    def has_read(self, input_ids: Tensor, valid: Tensor | None = None) -> bool:
        """Whether ``input_ids`` (B, T) are, in every row, exactly the tokens read so far (up to a hash collision).

        valid: (B, T) bool, None for all. What it leaves out may have been read all the same, all of it or what does
        not come before a row's first token: transformers takes pad tokens for padding where no mask is given, and
        rows that ended early have read theirs.

        Raises:
            ValueError: they are in some rows and in others not, so that there is no telling what is meant.
        """
        if self.fingerprint is None or input_ids.shape != (self.batch_size, self.seen_tokens):
            return False
        masks = [None] if valid is None else [valid, valid.cummax(1).values, None]
        same = torch.zeros(self.batch_size, dtype=torch.bool, device=self.fingerprint.device)
        for mask in masks:
            same |= _fingerprint(None, input_ids, mask).to(same.device) == self.fingerprint
        if same.any() and not same.all():
            rows = (~same).nonzero()[:, 0].tolist()
            raise ValueError(
                f"past_key_values has read other tokens than the given ids begin with in rows {rows}, the same in the "
                "rest: give only new ids, or no past_key_values"
            )
        return bool(same.all())

    def unread(self, input_ids: Tensor, attention_mask: Tensor | None, inputs_embeds: Tensor | None) -> int:
        """How many of the last given positions are new: of ``input_ids`` (B, T), or of ``inputs_embeds`` (B, T, C).

        attention_mask: over the given positions, or over those read before them too, which says that they are new.

        Raises:
            ValueError: all of them have been read.
        """
        seen = self.get_seq_length()
        given = input_ids.shape[1] if inputs_embeds is None else inputs_embeds.shape[1]
        if seen == 0 or given < seen or (attention_mask is not None and attention_mask.shape[1] > given):
            return given
        if inputs_embeds is not None:
            return given - seen if given > seen else given
        mask = None if attention_mask is None else attention_mask[:, :seen] != 0
        repeats = self.has_read(input_ids[:, :seen], mask)
        if repeats and given == seen:
            raise ValueError(
                f"past_key_values has already read all {given} given ids: give the text with at least one new token, "
                f"or, if they come once more, an attention_mask over all {seen + given} positions"
            )
        if not repeats and given > seen:
            logger.warning_once(
                "The given ids do not begin with what past_key_values has read, so all of them are read as new text. "
                "If that is meant, an attention_mask over past and new positions says so."
            )
        return given - seen if repeats else given

    def check_sizes(self, config: RwkvConfig, name: str) -> None:
        """Raises ValueError, which calls the cache ``name``, if it is not of a model with this configuration."""
        states = self._states()
        sizes = len(states), states[0].time_mix.shape[-1], states[0].wkv.shape[-1]
        expected = config.num_hidden_layers, config.hidden_size, config.attention_hidden_size
        if sizes != expected:
            raise ValueError(
                f"{name} comes from another model: its layers, hidden size and attention size are {sizes}, "
                f"this model's are {expected}"
            )

    def update(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("an RwkvCache holds no keys and values: give it to an RWKV model as past_key_values")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(
            "an RWKV cannot forget its last tokens, so its cache cannot be cropped: "
            "keep a clone() from before them and continue from that"
        )

    def activate_past_recording(self) -> None:
        """Nothing to record: a recurrent state cannot be rolled back."""

    def reset(self) -> None:
        """Forget everything."""
        self.layers = []
        self.seen_tokens = 0
        self.fingerprint = None

    def _apply(self, change: Callable[[Tensor, int], Tensor]) -> None:
        """``change`` makes another of each tensor: it is given that and which of its dimensions are the rows."""
        if self._stack is None:
            self.layers = [LayerState(*(change(x, 0) for x in state)) for state in self._layers]
        else:
            self.stack = Stack(*(change(x, 1) for x in self._stack))
        if self.fingerprint is not None:
            self.fingerprint = change(self.fingerprint, 0)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Row i becomes a copy of row ``beam_idx[i]``: beam search."""
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices``, (n,) int64 or (B,) bool, in that order."""
        if self.is_initialized:
            rows = torch.arange(self.batch_size, device=indices.device)[indices]
            self._apply(lambda x, dim: x.index_select(dim, rows.to(x.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row ``repeats`` times, copies side by side."""
        self._apply(lambda x, dim: x.repeat_interleave(repeats, dim))

    def clone(self) -> "RwkvCache":
        """An independent copy, with gradients flowing through it."""
        other = copy.copy(self)
        other._apply(lambda x, _: x.clone())
        return other

    def detach(self) -> "RwkvCache":
        """The same state without its history in autograd: the cut of truncated backpropagation through time."""
        other = copy.copy(self)
        other._apply(lambda x, _: x.detach())
        return other

    def to(
        self, device: torch.device | str | torch.dtype | None = None, dtype: torch.dtype | None = None
    ) -> "RwkvCache":
        """A copy on ``device`` and with token-shift inputs in ``dtype``; the WKV state keeps its own dtype."""
        if isinstance(device, torch.dtype):
            device, dtype = None, device
        other = copy.copy(self)
        other._apply(lambda x, _: x.to(device=device))
        if dtype is not None:
            other.layers = [LayerState(s.time_mix.to(dtype), s.channel_mix.to(dtype), s.wkv) for s in other.layers]
        return other

    def save(
        self, path: str | os.PathLike, model: PreTrainedModel | None = None, notes: Mapping[str, str] | None = None
    ) -> None:
        """Write the state to a safetensors file, whole or not at all.

        Args:
            model: the one that it is a state of: :meth:`load` then tells others of the same sizes apart.
            notes: words of your own to keep with it, see :func:`saved_notes`.

        Raises:
            ValueError: there is no state yet, or its sizes are not those of ``model``.
            OSError: the file cannot be written.
        """
        if not self.is_initialized:
            raise ValueError("this RwkvCache is empty, there is nothing to save: run the model on some tokens first")
        tensors = {
            f"layers.{i}.{name}": tensor.detach().contiguous()
            for i, layer in enumerate(self._states())
            for name, tensor in layer._asdict().items()
        }
        if self.fingerprint is not None:
            tensors["fingerprint"] = self.fingerprint
        metadata = {f"notes.{name}": text for name, text in (notes or {}).items()} | {
            "format": _FORMAT,
            "seen_tokens": str(self.seen_tokens),
            "num_layers": str(len(self._states())),
        }
        if model is not None:
            self.check_sizes(model.config, "the state")
            metadata["model"] = model_fingerprint(model)
        path = Path(path)
        try:
            with tempfile.TemporaryDirectory(dir=path.parent, prefix=".rwkv-") as folder:
                temporary = Path(folder) / "state"
                temporary.write_bytes(save(tensors, metadata))
                temporary.replace(path)
        except OSError as error:  # of a name that nobody gave
            error.filename, error.filename2 = str(path), None
            raise

    @classmethod
    def load(
        cls, path: str | os.PathLike, device: torch.device | str = "cpu", model: PreTrainedModel | None = None
    ) -> "RwkvCache":
        """Read what :meth:`save` wrote; with ``model``, only if it is a state of that model.

        Without ``model``, sizes are checked when a model is first given the state.

        Raises:
            FileNotFoundError: no such file.
            ValueError: the file is not a saved RwkvCache; or it is of another model: of other sizes, or, where the
                file was saved with its model, of other weights.
        """
        with _opened(path, device) as file:
            metadata = file.metadata()
            cache = cls()
            cache.seen_tokens = int(metadata["seen_tokens"])
            cache.layers = [
                LayerState(*(file.get_tensor(f"layers.{i}.{name}") for name in LayerState._fields))
                for i in range(int(metadata["num_layers"]))
            ]
            if "fingerprint" in file.keys():  # noqa: SIM118 - a safetensors file is not a mapping
                cache.fingerprint = file.get_tensor("fingerprint")
            if not _fit_together(cache.layers):
                raise SafetensorError("the sizes of its layers are not those of a state")
        if model is not None:
            cache.check_sizes(model.config, f"the state in {path}")
            saved, has_weights = metadata.get("model"), model.device.type != "meta"
            if saved is not None and has_weights and saved != (found := model_fingerprint(model)):
                raise ValueError(
                    f"the state in {path} comes from another model of these sizes: its fingerprint is {saved}, "
                    f"this model's is {found}"
                )
        return cache


def unstacked(stack: Stack) -> list[LayerState]:
    """Views of a stack, one state for each block."""
    return [*map(LayerState, *map(Tensor.unbind, stack))]


def saved_notes(path: str | os.PathLike) -> dict[str, str]:
    """The notes that :meth:`RwkvCache.save` put into a file.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is not a saved RwkvCache.
    """
    with _opened(path) as file:
        found = file.metadata().items()
    return {name.removeprefix("notes."): text for name, text in found if name.startswith("notes.")}


def model_fingerprint(model: PreTrainedModel) -> str:
    """16 hexadecimal digits that tell models of the same sizes apart, by what training changes and little else does.

    They are of time_decay and time_first, rounded to bfloat16: training moves them, and loading in another dtype,
    quantization and adapters on matrices leave them as they are.
    """
    digest = hashlib.sha256()
    for name, x in model.named_parameters():
        if name.endswith(("time_decay", "time_first")):
            digest.update(x.detach().to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


@contextmanager
def _opened(path: str | os.PathLike, device: torch.device | str = "cpu") -> Iterator[Any]:
    """A safetensors file of a saved RwkvCache; what is found to be missing in it becomes a ValueError."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file: give the path that RwkvCache.save() wrote")
    try:
        with safe_open(path, framework="pt", device=str(device)) as file:
            if (file.metadata() or {}).get("format") != _FORMAT:
                raise ValueError(f"{path} is a safetensors file but not a saved RwkvCache")
            yield file
    except (SafetensorError, KeyError) as error:
        raise ValueError(f"{path} is not a saved RwkvCache, or is damaged ({error})") from error


def _fit_together(layers: list[LayerState]) -> bool:
    """Whether there are layers, all of the shapes that LayerState says, for one B, C and A."""
    shapes = {tuple(part.shape for part in layer) for layer in layers}
    if len(shapes) != 1:
        return False
    ((time_mix, channel_mix, wkv),) = shapes
    return len(time_mix) == 2 and time_mix == channel_mix and len(wkv) == 3 and wkv[:2] == (time_mix[0], 3)


def _fingerprint(before: Tensor | None, input_ids: Tensor, valid: Tensor | None) -> Tensor:
    """A rolling hash (B,) int64 of the valid tokens so far: ``h <- h * factor + id + 1``, modulo 2^64.

    It tells `generate` whether the ids that it is given repeat what the cache has read or go on from there.
    """
    length = input_ids.shape[1]
    if length == 1 and valid is None:  # one more token: the same in fewer steps
        new = input_ids[:, 0].long() + 1
        return new if before is None else before.to(new.device) * _HASH_FACTOR + new
    valid = torch.ones_like(input_ids, dtype=torch.bool) if valid is None else valid
    count = valid.long().cumsum(1)
    powers = torch.full((length + 1,), _HASH_FACTOR, device=input_ids.device)
    powers[0] = 1
    powers = powers.cumprod(0)
    total = count[:, -1:]
    new = (torch.where(valid, (input_ids + 1) * powers[total - count], 0)).sum(1)
    return new if before is None else before.to(new.device) * powers[total[:, 0]] + new
