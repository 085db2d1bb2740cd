"""Laws of the gradients of the WKV-4 operator, and how far from float64 results may be."""

import functools
import itertools

import pytest
import torch
from wkv4_cases import (
    DIFFERENTIABLE,
    EXACT,
    FAST,
    KEYS,
    SITUATIONS,
    TIMES,
    agree,
    alone,
    cotangents,
    differentiate,
    head,
    leaves,
    make,
    readout,
    require,
    runner,
    tail,
    together,
    truth,
)

from rwkv_kernels import wkv4_portable
from rwkv_kernels.wkv4 import BACKENDS, wkv4, wkv4_reference

every_backend = pytest.mark.parametrize("backend", BACKENDS)
fast_backends = pytest.mark.parametrize("backend", FAST)
every_situation = pytest.mark.parametrize("situation", SITUATIONS)
# Some gradients of wild keys are small differences of large terms, which only float64 can show.
precise = pytest.mark.parametrize(
    ("situation", "dtype"),
    [("float32", torch.float32), ("float32-wild-sliced", torch.float64)],
    ids=["float32", "float64-wild-sliced"],
)
dense_and_packed = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


def case(time, backend, situation="float32", packed=False, **more):
    kwargs = SITUATIONS[situation] | more
    require(backend, kwargs.get("dtype", torch.float32))
    return make(time, backend, packed=packed, **kwargs)


def agree_on_gradients(actual, expected, dtype=torch.float32):
    """Gradients of one channel share one scale: some cancel to nothing beside others, or beside terms of 1."""
    tolerance = 1e-6 if dtype == torch.float64 else 1e-4
    for name in DIFFERENTIABLE:
        scale = channel_norm(expected[name]).clamp(min=1e-9)
        error = channel_norm(actual[name].double() - expected[name].double()) / scale
        assert error.max() <= tolerance, name


def channel_norm(x):
    """(..., C) to (C,): the length of what belongs to a channel."""
    return x.double().reshape(-1, x.shape[-1]).norm(dim=0)


@fast_backends
@every_situation
@pytest.mark.parametrize("time", TIMES)
@dense_and_packed
def test_errors_are_at_most_twice_those_of_the_sequential_reference(backend, situation, time, packed):
    """Against float64, of results and gradients.

    Measured once over the whole tensor (the length of the error over the length of the truth) and
    once in the median channel, so that large channels do not speak for small ones. Not in the worst
    channel or element: there, a gradient is what is left of terms that cancel, and the ratio of two
    such errors is luck. The floor is a quarter of a unit in the last place of the result, plus four
    roundings of an exponent as large as the keys: what any p that is stored costs.
    """
    x = case(time, backend, situation, packed)
    output, end, grads = differentiate(x, runner(backend))
    actual = {"output": output, "end": readout(end)} | grads
    exact = truth(time, situation, packed, True)
    sequential = truth(time, situation, packed, False)
    for name, true in exact.items():
        assert actual[name].dtype == sequential[name].dtype
        floor = torch.finfo(actual[name].dtype).eps / 4
        floor += 2 * torch.finfo(end.dtype).eps * SITUATIONS[situation].get("keys", KEYS)
        for size in (torch.linalg.vector_norm, channel_norm):
            unit = size(true).clamp(min=1e-15)  # the terms are of order 1: float64 knows no less of what they leave
            error = (size(actual[name].double().cpu() - true) / unit).median()
            allowed = (size(sequential[name].double() - true) / unit).median()
            assert error <= 2 * allowed + floor, name


@every_backend
@pytest.mark.parametrize("span", [3, 32])
@pytest.mark.parametrize("lengths", [(1,), (4,), (11, 0, 1, 5), (35,)], ids=str)
def test_gradcheck(backend, lengths, span, monkeypatch):
    """Through what a state stands for, A = a e^p and B = b e^p: its exponent is only a scale."""
    if backend == "reference" and span != 32:
        pytest.skip("has no spans")
    require(backend, torch.float64)
    monkeypatch.setattr(wkv4_portable, "SPAN", span)
    dense = len(lengths) == 1
    x = make(lengths[0], backend, dtype=torch.float64, channels=2, lengths=() if dense else lengths)
    x["time_decay"] = x["time_decay"].clamp(-3, 1)
    x["state"][0] = x["state"][1]  # a state of zeros has no derivative: it means no history
    exponent = x["state"][:, 2:]

    def run(time_decay, time_first, key, value, pair):
        state = torch.cat([pair, exponent], dim=1)
        y, s = wkv4(time_decay, time_first, key, value, state, x["cu_seqlens"], backend)
        return y, s[:, 0] * s[:, 2].exp(), s[:, 1] * s[:, 2].exp()

    names = ("time_decay", "time_first", "key", "value")
    inputs = [x[name].detach().clone().requires_grad_() for name in names]
    inputs.append(x["state"][:, :2].clone().requires_grad_())
    assert torch.autograd.gradcheck(run, inputs, fast_mode=max(lengths) > 4)


@every_backend
@pytest.mark.parametrize("time", [0, 1, 31, 129])
@dense_and_packed
def test_the_exponent_of_a_state_has_no_gradient(backend, time, packed):
    x = leaves(case(time, backend, packed=packed and time > 0))
    output, state = wkv4(**x, backend=backend)
    gradient = torch.autograd.grad(output.sum() + state[:, :2].sum(), x["state"])[0]
    assert not gradient[:, 2].any()
    assert gradient[1, :2].any()  # row 0 has no history
    if state.requires_grad and time:
        other = torch.autograd.grad(wkv4(**x, backend=backend)[1][:, 2].sum(), x["key"])[0]
        assert not other.any()


@every_backend
@precise
@pytest.mark.parametrize("time", [1, 31, 129])
@dense_and_packed
def test_gradients_of_a_pack_and_a_batch_are_those_of_its_parts(backend, situation, dtype, time, packed):
    x = case(time, backend, situation, packed, dtype=dtype)
    _, _, together_grads = differentiate(x, runner(backend))

    def separately(x):
        outputs, states = zip(*map(runner(backend), alone(x)), strict=True)
        return together(x, list(outputs)), torch.cat(states)

    _, _, separate_grads = differentiate(x, separately)
    agree_on_gradients(together_grads, separate_grads, dtype)


@every_backend
@precise
@pytest.mark.parametrize("time", [2, 31, 129])
@dense_and_packed
def test_gradients_flow_through_a_state(backend, situation, dtype, time, packed):
    """Backpropagation through time in chunks that pass on their state equals that in one piece."""
    x = case(time, backend, situation, packed, dtype=dtype)
    expected = differentiate(x, runner(backend))

    def in_chunks(x, cuts):
        outputs, state = [], x["state"]
        for begin, end in zip((0, *cuts), (*cuts, time), strict=True):
            chunk = tail(head(x, end), begin, state)
            output, state = wkv4(**chunk, backend=backend)
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    for cuts in ((1,), (time // 2,), (time // 3, time // 3, 2 * time // 3)):
        output, state, grads = differentiate(x, functools.partial(in_chunks, cuts=cuts))
        agree(output, expected[0], dtype=dtype)
        agree(readout(state), readout(expected[1]), dtype=dtype)
        agree_on_gradients(grads, expected[2], dtype)


@every_backend
@precise
def test_a_chain_of_single_steps_is_the_scan(backend, situation, dtype):
    x = case(67, backend, situation, dtype=dtype)

    def one_by_one(x):
        outputs, state = [], x["state"]
        for t in range(67):
            output, state = wkv4(**tail(head(x, t + 1), t, state), backend=backend)
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    output, state, grads = differentiate(x, one_by_one)
    expected, expected_state, expected_grads = differentiate(x, runner(backend))
    agree(output, expected, dtype=dtype)
    agree(output[:, :32], expected[:, :32], backend in EXACT, dtype)
    agree(readout(state), readout(expected_state), dtype=dtype)
    agree_on_gradients(grads, expected_grads, dtype)


@fast_backends
def test_gradients_of_a_hundred_thousand_tokens(backend):
    """Equal to those in pieces; and the output being linear in the values, <g, J v> = <J' g, v>."""
    time, cuts = 100_000, (0, 1, 30_000, 65_537, 100_000)
    x = case(time, backend, dtype=torch.float64, batch=1, channels=3)
    x["state"] = torch.zeros_like(x["state"])

    def in_chunks(x):
        outputs, state = [], x["state"]
        for begin, end in itertools.pairwise(cuts):
            output, state = wkv4(**tail(head(x, end), begin, state), backend=backend)
            outputs.append(output)
        return torch.cat(outputs, dim=1), state

    output, _, grads = differentiate(x, runner(backend))
    _, _, expected = differentiate(x, in_chunks)
    agree_on_gradients(grads, expected, torch.float64)
    x = leaves(x)
    output, _ = wkv4(**x, backend=backend)
    g, _ = cotangents(x)
    (gradient,) = torch.autograd.grad(output, x["value"], g)
    agree((g * output).sum(), (gradient * x["value"]).sum(), dtype=torch.float64)


@every_backend
@pytest.mark.parametrize("high_first", [True, False])
def test_gradients_survive_keys_that_jump_by_160(backend, high_first):
    x = case(64, backend)
    key = torch.full_like(x["key"], 80.0)
    key[:, 32:] = -80
    x["key"] = key if high_first else key.flip(1)
    _, _, grads = differentiate(x, runner(backend))
    double = {n: t.double().cpu() for n, t in x.items() if t is not None} | {"cu_seqlens": None}
    _, _, expected = differentiate(double, lambda x: wkv4_reference(**x))
    for name in ("time_first", "value", "state"):  # the others are zero but for rounding
        agree(grads[name].double().cpu(), expected[name])
    for name in DIFFERENTIABLE:
        assert grads[name].isfinite().all()


@every_backend
@pytest.mark.parametrize("time", [1, 31, 129])
@dense_and_packed
def test_gradients_have_the_same_bits_each_time_and_whichever_are_asked_for(backend, time, packed):
    x = case(time, backend, "float32-wild-sliced", packed)
    _, _, first = differentiate(x, runner(backend))
    _, _, second = differentiate(x, runner(backend))
    agree(first, second, exact=True)
    for name in DIFFERENTIABLE:
        only = leaves(x, (name,))
        output, state = wkv4(**only, backend=backend)
        results = zip([output, readout(state)], cotangents(x), strict=True)
        results, gradients = zip(*(r for r in results if r[0].requires_grad), strict=True)
        agree(torch.autograd.grad(results, only[name], gradients)[0], first[name], exact=True)


@every_backend
@pytest.mark.parametrize("time", [1, 31])
def test_gradients_of_one_result_alone(backend, time):
    """The output or the state may go unused, and the gradient of a sum has no strides."""
    x = leaves(case(time, backend))
    output, state = wkv4(**x, backend=backend)
    ones, a = torch.ones_like(output), torch.zeros_like(state)
    a[:, 0] = 1

    def grads(results, gradients=None):
        inputs = [x[name] for name in DIFFERENTIABLE]
        return torch.autograd.grad(
            results, inputs, gradients, retain_graph=True, allow_unused=True, materialize_grads=True
        )

    agree(grads(output.sum()), grads([output, state], [ones, a * 0]), exact=True)
    agree(grads(state[:, 0].sum()), grads([output, state], [ones * 0, a]), exact=True)


@every_backend
@pytest.mark.parametrize("time", [0, 1, 31])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_gradient_looks_like_its_input(backend, time, dtype):
    x = case(time, backend, dtype=dtype)
    x["time_decay"], x["time_first"] = x["time_decay"].to(torch.bfloat16), x["time_first"].half()
    x = leaves(x)
    output, state = wkv4(**x, backend=backend)
    (output.sum() + readout(state).sum()).backward()
    for name in DIFFERENTIABLE:
        grad = x[name].grad
        if time or grad is not None:
            assert grad.shape == x[name].shape and grad.dtype == x[name].dtype, name


@fast_backends
def test_a_second_derivative_is_refused_rather_than_wrong(backend):
    x = leaves(case(31, backend))
    output, _ = wkv4(**x, backend=backend)
    (grad,) = torch.autograd.grad(output.sum(), x["key"], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(grad.sum(), x["key"])
