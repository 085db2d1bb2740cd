"""Laws of the CUDA kernels on a machine without a GPU: their source runs on the CPU, thread by thread."""

import itertools

import pytest
import torch
from cuda_on_cpu import emulated
from wkv4_cases import DIFFERENTIABLE, SITUATIONS, agree, differentiate, in_double, make, readout, runner

from rwkv_kernels import loader, wkv4
from rwkv_kernels.wkv4 import wkv4_reference

# 1 multiprocessor: sequences stay whole. 132: they are cut, and the pieces joined.
processors = pytest.mark.parametrize("processors", [1, 132])
widths = pytest.mark.parametrize("channels", [37, 66], ids=["one-channel-threads", "two-channel-threads"])
SHAPES = {
    "dense-1": (1, ()),
    "dense-31": (31, ()),
    "dense-120": (120, ()),  # whole tiles and a half
    "dense-700": (700, ()),  # groups of pieces
    "packed": (0, (0, 1, 47, 48, 0, 49, 123, 24, 150, 0)),
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cuda")


def distance(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm().clamp(min=1e-15)).item()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("keys", [3.0, 80.0])
@processors
@widths
def test_errors_are_at_most_twice_those_of_the_sequential_reference(shape, keys, processors, channels, folder):
    time, lengths = SHAPES[shape]
    layout = "sliced" if keys > 3 else "contiguous"
    x = make(time, channels=channels, lengths=lengths, keys=keys, layout=layout)
    with emulated(folder, processors):
        output, end, grads = differentiate(x, runner("cuda"))
    results = {"output": output, "end": readout(end)} | grads
    for name, exact, sequential in zip(results, *map(reference, (in_double(x), x)), strict=True):
        floor = torch.finfo(torch.float32).eps * (1 + 2 * keys)
        assert distance(results[name], exact) <= 2 * distance(sequential, exact) + floor, name


def reference(x):
    output, end, grads = differentiate(x, lambda x: wkv4_reference(**x))
    return [output, readout(end), *grads.values()]


@pytest.mark.parametrize("kind", ["near", "far", "mixed"])
@processors
def test_one_exponent_for_all_tokens_or_one_each(kind, processors, folder):
    x = make(330, channels=70, **SITUATIONS[f"float32-{kind}"])
    with emulated(folder, processors):
        output, end, grads = differentiate(x, runner("cuda"))
    results = {"output": output, "end": readout(end)} | grads
    for name, exact, sequential in zip(results, *map(reference, (in_double(x), x)), strict=True):
        assert distance(results[name], exact) <= 2 * distance(sequential, exact) + 2e-5, name


@pytest.mark.parametrize(("keys", "fall"), [(10.0, 20.0), (25.0, 50.0), (5.0, 80.0)])
@pytest.mark.parametrize("bonus", [(-20.0, -18.0), (-75.0, -55.0)])
def test_keys_that_fall_below_a_past_that_fades(keys, fall, bonus, folder):
    """What is left of the past and what comes are both far below the largest exponent: 0 / 0, if nothing looked."""
    x = make(200, channels=37, keys=keys, bonus=bonus)
    x["key"] -= fall * (torch.arange(200) // 16 % 2)[:, None]
    with emulated(folder, 1):
        output, end, grads = differentiate(x, runner("cuda"))
    results = {"output": output, "end": readout(end)} | grads
    for name, exact, sequential in zip(results, *map(reference, (in_double(x), x)), strict=True):
        assert distance(results[name], exact) <= 2 * distance(sequential, exact) + 2e-5, name


@pytest.mark.parametrize("shape", SHAPES)
@processors
@widths
def test_half_precision_is_computed_in_float32(shape, processors, channels, folder):
    """In and out of bfloat16, so rounded once: as the portable implementation does it."""
    time, lengths = SHAPES[shape]
    x = make(time, channels=channels, lengths=lengths, dtype=torch.bfloat16)
    with emulated(folder, processors):
        output, end, grads = differentiate(x, runner("cuda"))
    expected, expected_end, expected_grads = differentiate(x, runner("portable"))
    agree(output, expected, dtype=torch.bfloat16)
    agree(readout(end), readout(expected_end))
    for name in DIFFERENTIABLE:
        assert distance(grads[name], expected_grads[name].double()) <= 5e-3, name


@processors
@pytest.mark.parametrize("bonus", [-30.0, 0.0, 30.0])
def test_values_as_large_as_their_dtype_allows(bonus, processors, folder):
    x = make(130, channels=37)
    x["value"], x["time_first"] = torch.full_like(x["value"], 1e36), x["time_first"] + bonus
    with emulated(folder, processors):
        output, _ = wkv4.wkv4(**x | {"state": None}, backend="cuda")
    agree(output, x["value"])


@processors
def test_gradients_share_no_memory(processors, folder):
    """An operator of PyTorch may not return views of one tensor."""
    x = make(100, channels=66)
    with emulated(folder, processors):
        _, _, grads = differentiate(x, runner("cuda"))
    assert len({gradient.untyped_storage().data_ptr() for gradient in grads.values()}) == len(grads)


@pytest.mark.parametrize(
    ("lengths", "rows"), [((1000, 900, 0, 100), 16), ((1000, *[10] * 50), 1)], ids=["even", "ragged"]
)
def test_one_long_sequence_does_not_cut_many_short_ones(lengths, rows, folder):
    """Each would have as many blocks of threads, and as much room, as the long one."""
    launched = []
    with emulated(folder, 132), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loader, "launch", lambda kernel, blocks, *_: launched.append(blocks))
        wkv4.wkv4(**make(0, lengths=lengths, channels=66), backend="cuda")
    assert [blocks[1] for blocks in launched] == [rows]


@processors
def test_the_same_bits_twice(processors, folder):
    x = make(0, lengths=(100, 0, 61), channels=66)
    with emulated(folder, processors):
        first, second = (differentiate(x, runner("cuda")) for _ in range(2))
    agree(first, second, exact=True)


@processors
def test_the_state_of_a_sequence_of_no_tokens_comes_back_as_it_was(processors, folder):
    x = make(0, lengths=(0, 0, 100, 0), channels=37)  # the first of them is all zeros
    with emulated(folder, processors):
        _, state = wkv4.wkv4(**x, backend="cuda")
    empty = x["cu_seqlens"].diff() == 0
    agree(state[empty], x["state"][empty], exact=True)


@processors
def test_a_run_may_be_split_anywhere(processors, folder):
    x = make(130, channels=37)
    with emulated(folder, processors):
        output, end = wkv4.wkv4(**x, backend="cuda")
        for s in (1, 47, 48, 100):
            halves, state = [], x["state"]
            for begin, stop in itertools.pairwise((0, s, 130)):
                part = x | {"key": x["key"][:, begin:stop], "value": x["value"][:, begin:stop], "state": state}
                half, state = wkv4.wkv4(**part, backend="cuda")
                halves.append(half)
            agree(torch.cat(halves, dim=1), output)
            agree(readout(state), readout(end))
