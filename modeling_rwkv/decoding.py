"""Where a model's next token is computed at once instead of module by module.

`RwkvForCausalLM.forward` asks :func:`next_token` first. It has an answer where nobody could tell the difference but by
the clock: one new token a row, without autograd, in a model that nobody watches. For a few rows a kernel reads the
weights of ordinary modules, `rwkv_kernels.decode_cpu` on a CPU and `rwkv_kernels.decode_cuda` on a GPU. There, if the
cache is an :class:`RwkvStaticCache`, kernels or modules, for any number of rows, are replayed from a CUDA graph.
"""

import operator
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from itertools import repeat
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from transformers.modeling_outputs import CausalLMOutputWithPast

from modeling_rwkv.cache import RwkvCache
from modeling_rwkv.static_cache import CAPTURING, Replay, RwkvStaticCache, rows_of, table_of
from rwkv_kernels import decode_cpu, decode_cuda, decode_weights
from rwkv_kernels.decode_weights import Stack
from rwkv_kernels.loader import Unavailable
from rwkv_kernels.wkv4_native import are_at_hand


def next_token(
    model: Any,
    input_ids: Tensor | None,
    attention_mask: Tensor | None,
    past_key_values: RwkvCache | None,
    use_cache: bool | None,
    output_hidden_states: bool | None,
    logits_to_keep: int | Tensor,
) -> CausalLMOutputWithPast | None:
    """Logits (B, 1, V) after one more token, and the cache; or None, where the modules have to run.

    The arguments are those of ``RwkvForCausalLM.forward``; those that are missing must not be given, or, like
    ``position_ids``, mean nothing for one token.
    """
    if not model.native_decoding or torch.is_grad_enabled() or not are_at_hand(input_ids, attention_mask):
        return None
    if not isinstance(input_ids, Tensor) or input_ids.dtype not in _IDS or input_ids.shape[1:] != (1,):
        return None
    rows, past, device = len(input_ids), past_key_values, input_ids.device
    if past is None or type(past) not in (RwkvCache, RwkvStaticCache) or past.batch_size != rows:
        return None
    use_cache = (model.config.use_cache and not model.training) if use_cache is None else use_cache
    if not use_cache or (model.config.output_hidden_states if output_hidden_states is None else output_hidden_states):
        return None
    if not isinstance(logits_to_keep, int) or logits_to_keep < 0 or torch.is_autocast_enabled(device.type):
        return None
    if device.type not in DECODERS or not _reads_all(attention_mask, rows):
        return None
    once = _once.get()
    found = once.look(past) if once is not None and once.model is model else _look(model, past)
    logits = None if found is None else found.plan.step(model, input_ids, past, found.table)
    if logits is None:
        return None
    return CausalLMOutputWithPast(logits=logits[:, None], past_key_values=past.advance(None, 1, input_ids, None))


def why_not(model: Any) -> str | None:
    """Why tokens of this model are not computed by a kernel; None if they are, without autograd."""
    if not model.native_decoding:
        return "native_decoding is False"
    plan = _plan_of(model)
    return "it has hooks" if plan.is_hooked() else plan.reason


def _reads_all(attention_mask: Tensor | None, rows: int) -> bool:
    if attention_mask is None:
        return True
    shape = attention_mask.shape
    return len(shape) == 2 and shape[0] == rows and shape[1] > 0 and bool(attention_mask[:, -1].all())


class _Found(NamedTuple):
    """What computes the next token of a model, and the table of its embeddings, if they are one."""

    plan: "_Plan"
    table: Tensor | None


class _Once:
    """A model that is looked at once, see :func:`held`."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._found: dict[type, _Found | None] = {}
        self._kept: list[Tensor] = []

    def look(self, cache: RwkvCache) -> _Found | None:
        kind = type(cache)
        if kind not in self._found:
            found = _look(self.model, cache)
            if found is not None and kind is RwkvStaticCache and not found.plan.is_ours:
                return found
            if found is not None:
                self._kept += found.plan.weights()
                found = found._replace(table=None if found.table is None else found.table.data)
            self._found[kind] = found
        return self._found[kind]


_once: ContextVar[_Once | None] = ContextVar("_once", default=None)


@contextmanager
def held(model: Any) -> Iterator[None]:
    """Within, as in `generate`, nobody replaces weights, modules or hooks of the model: it is looked at once.

    A look at each token would take half a millisecond where weights have driven all else out of the caches. In place
    weights may be edited, and what is replaced all the same is read to the end.
    """
    before = _once.set(_Once(model))
    try:
        yield
    finally:
        _once.reset(before)


# Weights are found once: a plan holds as long as every module and tensor is the one that was found.

_GLOBAL_HOOKS = (torch_module._global_forward_hooks, torch_module._global_forward_pre_hooks)
_plans: WeakKeyDictionary[nn.Module, "_Plan"] = WeakKeyDictionary()


def _plan_of(model: nn.Module) -> "_Plan":
    plan = _plans.get(model)
    if plan is None or not plan.holds():
        with CAPTURING:  # threads share a plan, and none lets go of graphs while one is captured
            plan = _plans.get(model)
            if plan is None or not plan.holds():
                plan = _plans[model] = _Plan(model)
    return plan


def _look(model: nn.Module, cache: RwkvCache) -> _Found | None:
    """None where somebody watches the modules.

    A static cache keeps to the plan that it began with. Where there are modules of others, such as adapters that can
    be switched off, what is looked at does not tell all that they compute: a graph of them is of one cache.
    """
    if not isinstance(cache, RwkvStaticCache):
        plan = _plan_of(model)
    else:
        if cache.plan is None or cache.plan[0]() is not model:
            plan = _plan_of(model)
            cache.plan = weakref.ref(model), plan if plan.is_ours else _Plan(model)
        plan = cache.plan[1]
    return None if plan.is_hooked() else _Found(plan, plan.table)


class _Plan:
    """A decoder of a model, or the reason that there is none; and what shows whether that is still so.

    replays: the model as a CUDA graph, for each stream and kind of states; None where it cannot be one.
    """

    def __init__(self, model: Any) -> None:
        modules = [*model.rwkv.modules(), *model.head.modules()]
        self._attributes = [module.__dict__ for module in modules]
        self._hooks = [hooks for x in modules for hooks in (x._forward_hooks, x._forward_pre_hooks)]
        slots = [(model._modules, "rwkv"), (model._modules, "head")]
        for module in modules:
            kept = module._modules, module._parameters, module._buffers
            slots += [(parts, name) for parts in kept for name in parts]
            slots += [(module.__dict__, name) for name in ("eps", "max_norm") if name in module.__dict__]
            slots += [(x.__dict__, name) for x in module._parameters.values() if _is_int8(x) for name in _INT8_PARTS]
        self._holders, self._names = zip(*slots, strict=True)
        self._kinds = {type(module) for module in modules}
        self._held = self._now()
        self.decoder: decode_cpu.Decoder | decode_cuda.Decoder | None = None
        self.replays: dict[tuple[Any, ...], Replay | None] = {}
        self.reason: str | None = None
        self.is_ours = False  # whether this package's modules, and embeddings, are all that there is
        self._tensors = [x for x in self._held if type(x) in (Tensor, nn.Parameter)]
        self.table = table_of(model.rwkv.embeddings)
        try:
            weights = _weights(model)
            self.is_ours = type(model.rwkv.embeddings) is nn.Embedding
            self.decoder = DECODERS.get(weights.head.data.device.type, decode_cpu.Decoder)(weights)
        except (ValueError, Unavailable) as error:
            self.reason = str(error)
        self._places = self._where()

    def holds(self) -> bool:
        return all(map(operator.is_, self._now(), self._held)) and self._where() == self._places

    def is_hooked(self) -> bool:
        """Whether anybody watches what modules are given and give, or has replaced their ``forward``."""
        return (
            any(self._hooks) or any(_GLOBAL_HOOKS) or any(map(operator.contains, self._attributes, repeat("forward")))
        )

    def weights(self) -> list[Tensor]:
        """The tensors as they are now, whatever becomes of the parameters."""
        return [x.data for x in self._tensors]

    def step(self, model: Any, input_ids: Tensor, past: RwkvCache, table: Tensor | None) -> Tensor | None:
        """Logits (B, V) after one more token (B, 1), and ``past`` has its states; None if the modules have to run."""
        decoder = None if self.decoder is None or len(input_ids) > self.decoder.most_rows else self.decoder
        is_static = isinstance(past, RwkvStaticCache)
        can_replay = is_static and input_ids.is_cuda and not model.training
        if (decoder is None and not can_replay) or (states := past.stack) is None:
            return None
        if can_replay and (replay := self._replay(model, input_ids, past, states)) is not None:
            return replay.step(input_ids, past)
        if decoder is None:
            return None
        before, after = past.turns(states) if is_static else (states, states.empty_like())
        logits = decoder.step(*rows_of(table, model, input_ids), before, after)
        if logits is not None:
            past.stack = after
        return logits

    def _replay(self, model: Any, input_ids: Tensor, past: RwkvCache, states: Stack) -> Replay | None:
        device = input_ids.device
        if model.training or states.wkv.device != device or torch.cuda.is_current_stream_capturing():
            return None
        key = torch.cuda.current_stream(device).cuda_stream, *map(_SHAPE, states), *map(_DTYPE, states)
        if key not in self.replays:
            past.check_sizes(model.config, "past_key_values")
            decoder = self.decoder if isinstance(self.decoder, decode_cuda.Decoder) else None
            with CAPTURING:
                if key not in self.replays:
                    self.replays[key] = Replay.of(model, decoder, self.table, states)
        return self.replays[key]

    def _now(self) -> list[Any]:
        return [*map(dict.get, self._holders, self._names), *map(_FORWARD, self._kinds)]

    def _where(self) -> list[Any]:
        return [kind(x) for kind in (Tensor.data_ptr, Tensor.stride, _DTYPE, _SHAPE) for x in self._tensors]


DECODERS: dict[str, Any] = {"cpu": decode_cpu.Decoder, "cuda": decode_cuda.Decoder}
_DTYPE, _SHAPE, _FORWARD = map(operator.attrgetter, ("dtype", "shape", "forward"))
_IDS = torch.int64, torch.int32
_INT8_PARTS = "qdata", "scale", "zero_point"


def _weights(model: Any) -> decode_weights.Model:
    """Raises ValueError for a module of another kind."""
    from modeling_rwkv import modeling_rwkv  # which imports this module

    ours: Any = modeling_rwkv
    rwkv, first, blocks = model.rwkv, model.rwkv.blocks[0], list(model.rwkv.blocks)
    _check_kinds(ours.RwkvModel, [rwkv])
    _check_kinds(ours.RwkvBlock, blocks)
    _check_kinds(ours.RwkvTimeMix, [block.attention for block in blocks])
    _check_kinds(ours.RwkvChannelMix, [block.feed_forward for block in blocks])
    norms = [first.pre_ln, rwkv.ln_out, *(norm for block in blocks for norm in (block.ln1, block.ln2))]
    _check_kinds(ours.RwkvLayerNorm, norms)
    return decode_weights.Model(
        dtype=model.head.weight.dtype,  # of int8: what it stands for
        blocks=[*map(_block, blocks)],
        pre_ln=_norm(first.pre_ln),
        ln_out=_norm(rwkv.ln_out),
        head=_matrix(model.head),
    )


def _check_kinds(kind: type, modules: Iterable[nn.Module]) -> None:
    for module in modules:
        if type(module) is not kind:
            raise ValueError(f"there is a {type(module).__name__} where a {kind.__name__} was expected")
    forward = _FORWARD(kind).__qualname__
    if forward != f"{kind.__qualname__}.forward":
        raise ValueError(f"the forward of {kind.__name__} is {forward}")


def _block(block: Any) -> decode_weights.Block:
    attention, feed_forward = block.attention, block.feed_forward
    return decode_weights.Block(
        ln1=_norm(block.ln1),
        ln2=_norm(block.ln2),
        time_decay=attention.time_decay,
        time_first=attention.time_first,
        attention_mix=(attention.time_mix_key, attention.time_mix_value, attention.time_mix_receptance),
        feed_forward_mix=(feed_forward.time_mix_key, feed_forward.time_mix_receptance),
        key=_matrix(attention.key),
        value=_matrix(attention.value),
        receptance=_matrix(attention.receptance),
        output=_matrix(attention.output),
        feed_forward_key=_matrix(feed_forward.key),
        feed_forward_receptance=_matrix(feed_forward.receptance),
        feed_forward_value=_matrix(feed_forward.value),
    )


def _norm(norm: Any) -> decode_weights.Norm:
    return decode_weights.Norm(norm.weight, norm.bias, norm.eps)


def _matrix(linear: Any) -> decode_weights.Matrix:
    _check_kinds(nn.Linear, [linear])
    if linear.bias is not None:
        raise ValueError("a matrix has a bias")
    weight = linear.weight
    if not _is_int8(weight):
        return decode_weights.Matrix(weight)
    if weight.act_quant_kwargs is not None or weight.act_pre_scale is not None or bool(weight.zero_point.any()):
        raise ValueError("int8 matrices have zero points, or inputs are rounded, too")
    return decode_weights.Matrix(weight.qdata, weight.scale)


def _is_int8(weight: Any) -> bool:
    """Whether this is what torchao makes of a matrix by ``Int8WeightOnlyConfig()``."""
    kind = type(weight)
    return kind.__name__ == "Int8Tensor" and kind.__module__.startswith("torchao.")
