"""What the laws of the model are tried on: small random models of odd shapes, texts, and ways to compare.

The paper's initialisation makes many matrices zero, so that a broken path could not be seen: every parameter here is
random, at the sizes that training gives.
"""

import hashlib
import math

import torch
from torch import Tensor, nn

from modeling_rwkv import RwkvCache, RwkvConfig, RwkvForCausalLM

# Nothing divides anything; rescale_every 2 halves the residual stream once or more in float16.
SHAPES = {
    "one layer": {"vocab_size": 31, "hidden_size": 20, "num_hidden_layers": 1},
    "wide attention": {
        "vocab_size": 53,
        "hidden_size": 12,
        "attention_hidden_size": 28,
        "intermediate_size": 19,
        "num_hidden_layers": 3,
        "rescale_every": 2,
    },
    "narrow attention": {
        "vocab_size": 77,
        "hidden_size": 33,
        "attention_hidden_size": 17,
        "intermediate_size": 71,
        "num_hidden_layers": 7,
        "rescale_every": 2,
        "layer_norm_epsilon": 1e-3,
    },
    "one channel": {"vocab_size": 5, "hidden_size": 1, "intermediate_size": 1, "num_hidden_layers": 2},
}
PLAIN = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 3, "rescale_every": 2}
ODD = PLAIN | {"hidden_size": 37, "attention_hidden_size": 50, "intermediate_size": 101}

TOLERANCE = {"rtol": 1e-4, "atol": 1e-5}  # two runs of the same float32 sums in another order


def make(shape: str | dict | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes):
    """A random model in eval mode. It has no end of text, so that generation does not stop early."""
    sizes = SHAPES[shape] if isinstance(shape, str) else shape or PLAIN
    config = RwkvConfig(**{"bos_token_id": None, "eos_token_id": None} | sizes | changes)
    return randomise(RwkvForCausalLM(config), seed).to(dtype).eval()


@torch.no_grad()
def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random weights by name and shape alone: the same for any implementation with these names."""
    generator = torch.Generator().manual_seed(seed)
    for name, x in model.named_parameters():
        draw = torch.randn(x.shape, generator=generator)
        if "time_mix" in name:
            draw = torch.rand(x.shape, generator=generator)
        elif "time_decay" in name:
            draw = torch.rand(x.shape, generator=generator) * 7 - 5
        elif "ln" in name:
            draw = draw * 0.2 + name.endswith("weight")
        elif x.ndim == 2 and "embeddings" not in name:
            draw = draw * 1.5 / math.sqrt(x.shape[1])
        x.copy_(draw)
    return model


def text(rows: int, length: int, vocab_size: int = 61, seed: int = 0) -> Tensor:
    """Random ids (rows, length)."""
    return torch.randint(vocab_size, (rows, length), generator=torch.Generator().manual_seed(seed + 100 * length))


@torch.no_grad()
def read(model, ids, native=True, begin=3, cache=None):
    """Logits of one token after another, and the cache, after ``begin`` tokens at once."""
    model.native_decoding = native
    cache = model(ids[:, :begin], past_key_values=cache, use_cache=True).past_key_values
    logits = [model(token[:, None], past_key_values=cache, use_cache=True).logits for token in ids[:, begin:].T]
    del model.native_decoding
    return torch.cat(logits, 1), cache


def both(model, ids):
    """What `read` gives with and without kernels for the next token."""
    return read(model, ids), read(model, ids, native=False)


def padded(rows: list[Tensor], side: str = "left", filler: int = 0) -> tuple[Tensor, Tensor]:
    """Texts (n,) of several lengths as one batch and its mask."""
    longest = max(map(len, rows))
    ids = torch.full((len(rows), longest), filler)
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(longest - len(row), None) if side == "left" else slice(len(row))
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def agree(actual, expected, **tolerance) -> None:
    torch.testing.assert_close(actual, expected, **TOLERANCE | tolerance)


def same(actual, expected) -> None:
    """Equal bit for bit."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def contents(cache: RwkvCache) -> list[Tensor]:
    """What a cache stands for, whatever the scale of its WKV state: per layer shifts, averages and log of weights."""
    parts: list[Tensor] = []
    for layer in cache.layers:
        a, b, p = layer.wkv.unbind(1)
        empty = b == 0
        b = b.masked_fill(empty, 1)
        weight = (b.log() + p.detach()).masked_fill(empty, -math.inf)
        parts += [layer.time_mix, layer.channel_mix, (a / b).masked_fill(empty, 0), weight]
    return parts


def row_of(cache: RwkvCache, row: int) -> RwkvCache:
    cache = cache.clone()
    cache.batch_select_indices(torch.tensor([row]))
    return cache


def bits(model: nn.Module) -> str:
    """A fingerprint of every parameter and buffer."""
    digest = hashlib.sha256()
    for name, x in sorted(model.state_dict().items()):
        digest.update(name.encode() + x.detach().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """The gradient of every parameter, taken away from the model."""
    grads = {name: x.grad for name, x in model.named_parameters() if x.requires_grad}
    assert all(grad is not None for grad in grads.values()), [n for n, g in grads.items() if g is None]
    model.zero_grad(set_to_none=True)
    return grads
