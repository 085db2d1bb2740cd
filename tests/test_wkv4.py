"""Laws of the WKV-4 operator, the same for every backend: what comes out, and what is refused."""

import math

import pytest
import torch
from wkv4_cases import (
    EXACT,
    FAST,
    SITUATIONS,
    TIMES,
    agree,
    alone,
    device_of,
    head,
    make,
    readout,
    require,
    runner,
    tail,
    together,
)

from rwkv_kernels import wkv4_portable
from rwkv_kernels.wkv4 import BACKENDS, choose_backend, empty_state, wkv4, wkv4_reference

every_backend = pytest.mark.parametrize("backend", BACKENDS)
every_time = pytest.mark.parametrize("time", TIMES)
dense_and_packed = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])
every_situation = pytest.mark.parametrize("situation", SITUATIONS)


def case(time, backend, situation="float32", packed=False, **more):
    kwargs = SITUATIONS[situation] | more
    require(backend, kwargs.get("dtype", torch.float32))
    return make(time, backend, packed=packed, **kwargs)


def naive(x):
    """The paper's equations as they stand, in Python's floats: shares no code with the operator."""
    out = x["key"].clone().double()
    for n in range(x["key"].shape[0]):
        for c in range(x["key"].shape[2]):
            decay = math.exp(-math.exp(x["time_decay"][c]))
            u = float(x["time_first"][c])
            a, b, p = x["state"][n, :, c].tolist()
            a, b = a * math.exp(p), b * math.exp(p)
            k, v = x["key"][n, :, c].tolist(), x["value"][n, :, c].tolist()
            ys = []
            for kt, vt in zip(k, v, strict=True):
                bonus, weight = math.exp(u + kt), math.exp(kt)
                ys.append((a + bonus * vt) / (b + bonus))
                a, b = decay * a + weight * vt, decay * b + weight
            out[n, :, c] = torch.tensor(ys, dtype=torch.float64)
    return out


@every_backend
@pytest.mark.parametrize("time", [1, 2, 31, 129])
def test_output_is_the_equations_of_the_paper(backend, time):
    x = case(time, backend, dtype=torch.float64)
    output, _ = wkv4(**x, backend=backend)
    agree(output.cpu(), naive(x), dtype=torch.float64)


@pytest.mark.parametrize("backend", FAST)
def test_a_hundred_thousand_tokens(backend):
    x = case(100_000, backend, dtype=torch.float64, batch=1, channels=3)
    x["time_decay"] = torch.tensor([-8.0, -3.0, 1.0], dtype=torch.float64, device=device_of(backend))
    output, _ = wkv4(**x, backend=backend)
    agree(output.cpu(), naive(x), dtype=torch.float64)


@every_backend
@every_situation
@every_time
@dense_and_packed
def test_a_run_may_be_split_anywhere(backend, situation, time, packed):
    x = case(time, backend, situation, packed)
    output, state = wkv4(**x, backend=backend)
    few = {0, 1, 32, 33, time // 2, time - 1, time} if backend in FAST else {time // 2}
    for s in range(time + 1) if time < 32 else sorted(few & set(range(time + 1))):
        first, middle = wkv4(**head(x, s), backend=backend)
        second, end = wkv4(**tail(x, s, middle), backend=backend)
        agree(torch.cat([first, second], dim=1), output, dtype=output.dtype)
        agree(readout(end), readout(state))


@every_backend
@every_situation
@every_time
@dense_and_packed
def test_the_future_does_not_reach_the_past(backend, situation, time, packed):
    x = case(time, backend, situation, packed)
    output, _ = wkv4(**x, backend=backend)
    for t in sorted({0, 1, time // 2, time - 1}):
        poisoned = x | {"key": x["key"].clone(), "value": x["value"].clone()}
        poisoned["key"][:, t:] = torch.nan
        poisoned["value"][:, t:] = torch.nan
        agree(wkv4(**poisoned, backend=backend)[0][:, :t], output[:, :t], backend in EXACT, output.dtype)
        agree(wkv4(**head(x, t), backend=backend)[0], output[:, :t], backend in EXACT, output.dtype)


@every_backend
@every_situation
@every_time
@dense_and_packed
def test_a_row_and_a_packed_sequence_equal_themselves_alone(backend, situation, time, packed):
    x = case(time, backend, situation, packed)
    output, state = wkv4(**x, backend=backend)
    outputs, states = zip(*map(runner(backend), alone(x)), strict=True)
    agree(together(x, list(outputs)), output, backend in EXACT, output.dtype)
    agree(readout(torch.cat(states)), readout(state), backend in EXACT)


@pytest.mark.parametrize("backend", EXACT)
@pytest.mark.parametrize("channels", [1, 3, 37, 64])
def test_a_sequence_has_the_same_bits_wherever_it_lies(backend, channels):
    """Each start in memory once, since vector instructions may treat the last few numbers apart."""
    one = case(96, backend, batch=1, channels=channels)
    expected, _ = wkv4(**one | {"state": None}, backend=backend)
    for before in range(0, 40, 3):
        x = case(0, backend, channels=channels, lengths=(before, 96, 5))
        x["key"][:, before : before + 96] = one["key"]
        x["value"][:, before : before + 96] = one["value"]
        x |= {"time_decay": one["time_decay"], "time_first": one["time_first"], "state": None}
        output, _ = wkv4(**x, backend=backend)
        agree(output[:, before : before + 96], expected, exact=True)


@every_backend
def test_one_sequence_does_not_reach_another(backend):
    x = case(129, backend, packed=True)
    output, state = wkv4(**x, backend=backend)
    for n in (3, 4):
        begin, end = x["cu_seqlens"][n : n + 2].tolist()
        poisoned = x | {"key": x["key"].clone()}
        poisoned["key"][:, begin:end] = torch.nan
        y, s = wkv4(**poisoned, backend=backend)
        others = torch.arange(len(s)) != n
        agree(s[others], state[others], exact=True)
        agree(y[:, :begin], output[:, :begin], exact=True)
        agree(y[:, end:], output[:, end:], exact=True)


@every_backend
@every_time
@dense_and_packed
def test_a_second_call_gives_the_same_bits(backend, time, packed):
    x = case(time, backend, "float32-wild-sliced", packed)
    first = wkv4(**x, backend=backend)
    agree(wkv4(**x, backend=backend), first, exact=True)
    with torch.inference_mode():
        agree(wkv4(**x, backend=backend), first, exact=True)


@every_backend
@pytest.mark.parametrize("time", [1, 31])
def test_no_history_has_three_spellings(backend, time):
    """Keys of -120: beside the p = 0 of a zero-filled state exp(k - p) is 0, and 0 / 0 is NaN."""
    x = case(time, backend)
    for key in (x["key"], torch.full_like(x["key"], -120)):
        spellings = [None, torch.zeros_like(x["state"]), empty_state(key, len(key))]
        results = [wkv4(**x | {"key": key, "state": state}, backend=backend) for state in spellings]
        for result in results:
            agree(result, results[0], exact=True)
        output, state = results[0]
        assert state.isfinite().all()
        agree(output[:, 0], x["value"][:, 0])  # an average over one token
    agree(empty_state(key, 2)[:, 2].cpu(), torch.full((2, 37), -1e38))
    assert not empty_state(key, 2)[:, :2].any()


@every_backend
def test_a_channel_without_history_ignores_the_rest_of_its_state(backend):
    x = case(31, backend)
    state = x["state"].clone()
    state[0] = torch.tensor([0.0, 0.0, 60.0])[:, None]
    agree(wkv4(**x | {"state": state}, backend=backend), wkv4(**x, backend=backend), exact=True)


@every_backend
@pytest.mark.parametrize("time", [1, 31])
def test_the_exponent_of_a_state_is_a_scale(backend, time):
    x = case(time, backend)
    state = x["state"].clone()
    state[:, :2] *= math.exp(-20)
    state[:, 2] += 20
    output, end = wkv4(**x | {"state": state}, backend=backend)
    expected, expected_end = wkv4(**x, backend=backend)
    agree(output, expected)
    agree(readout(end), readout(expected_end))


@every_backend
def test_no_tokens_leave_the_state_as_it_was(backend):
    x = case(129, backend, packed=True)
    _, state = wkv4(**x, backend=backend)
    empty = x["cu_seqlens"].diff() == 0
    assert empty.sum() == 2
    agree(state[empty], x["state"][empty], exact=True)
    lengths = torch.zeros(len(state) + 1, dtype=torch.int64, device=state.device)
    for nothing in (head(x, 0) | {"cu_seqlens": lengths}, head(case(2, backend), 0)):
        output, state = wkv4(**nothing, backend=backend)
        assert output.shape == nothing["key"].shape and output.dtype == nothing["key"].dtype
        agree(state, nothing["state"], exact=True)
        assert state.data_ptr() != nothing["state"].data_ptr()


@every_backend
@pytest.mark.parametrize("shape", [(0, 5, 3), (2, 5, 0), (0, 1, 3), (2, 1, 0)])
def test_no_rows_and_no_channels_are_allowed(backend, shape):
    batch, time, channels = shape
    x = case(time, backend, channels=channels)
    x |= {name: x[name][:batch] for name in ("key", "value", "state")}
    for state in (x["state"], None):
        output, end = wkv4(**x | {"state": state}, backend=backend)
        assert output.shape == shape and end.shape == (batch, 3, channels)


@every_backend
@pytest.mark.parametrize("high_first", [True, False])
def test_keys_may_jump_by_160(backend, high_first):
    x = case(64, backend)
    key = torch.full_like(x["key"], 80.0)
    key[:, 32:] = -80
    x["key"] = key if high_first else key.flip(1)
    output, state = wkv4(**x, backend=backend)
    expected, expected_state = wkv4_reference(**{n: t.double().cpu() for n, t in x.items() if t is not None})
    agree(output.double().cpu(), expected)
    agree(readout(state).double().cpu(), readout(expected_state))


@every_backend
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_strides_do_not_matter(backend, packed, layout):
    expected = wkv4(**case(129, backend, packed=packed), backend=backend)
    agree(
        wkv4(**case(129, backend, packed=packed, layout=layout), backend=backend),
        expected,
        backend in EXACT,
    )


@every_backend
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("time", [0, 1, 31])
def test_results_have_the_documented_dtype_and_shape(backend, dtype, time):
    x = case(time, backend, dtype=dtype)
    x["time_decay"] = x["time_decay"].to(torch.bfloat16)
    for state in (x["state"], None):
        output, end = wkv4(**x | {"state": state}, backend=backend)
        assert output.shape == x["key"].shape and output.dtype == dtype
        assert end.shape == (2, 3, 37) and end.dtype == torch.promote_types(dtype, torch.float32)


@every_backend
def test_bounds_of_sequences_may_be_int32_or_int64(backend):
    x = case(129, backend, packed=True)
    assert x["cu_seqlens"].dtype == torch.int32
    agree(
        wkv4(**x | {"cu_seqlens": x["cu_seqlens"].long()}, backend=backend),
        wkv4(**x, backend=backend),
        exact=True,
    )


def test_auto_takes_what_choose_backend_says():
    x = make(31)
    assert choose_backend(x["key"]) in FAST
    agree(wkv4(**x), wkv4(**x, backend=choose_backend(x["key"])), exact=True)


def test_the_levels_of_the_scan_do_not_matter(monkeypatch):
    x = make(129, packed=True, dtype=torch.float64, keys=80.0)
    expected, expected_state = wkv4_reference(**x)
    for span in (2, 3, 7, 200):
        monkeypatch.setattr(wkv4_portable, "SPAN", span)
        output, state = wkv4(**x, backend="portable")
        agree(output, expected, dtype=torch.float64)
        agree(readout(state), readout(expected_state), dtype=torch.float64)


META = {"device": "meta"}
REFUSED = {
    "key without batch": ("key", {"key": torch.zeros(4, 3)}),
    "key of integers": ("key", {"key": torch.zeros(2, 4, 3, dtype=torch.int64)}),
    "value shorter": ("value", {"value": torch.zeros(2, 3, 3)}),
    "value of another dtype": ("value", {"value": torch.zeros(2, 4, 3, dtype=torch.float64)}),
    "value elsewhere": ("value", {"value": torch.zeros(2, 4, 3, **META)}),
    "time_decay with time": ("time_decay", {"time_decay": torch.zeros(1, 3)}),
    "time_decay too long": ("time_decay", {"time_decay": torch.zeros(4)}),
    "time_decay of integers": ("time_decay", {"time_decay": torch.zeros(3, dtype=torch.int64)}),
    "time_decay elsewhere": ("time_decay", {"time_decay": torch.zeros(3, **META)}),
    "time_first too long": ("time_first", {"time_first": torch.zeros(4)}),
    "time_first of integers": ("time_first", {"time_first": torch.zeros(3, dtype=torch.int64)}),
    "time_first elsewhere": ("time_first", {"time_first": torch.zeros(3, **META)}),
    "state of three rows": ("state", {"state": torch.zeros(3, 3, 3)}),
    "state without p": ("state", {"state": torch.zeros(2, 2, 3)}),
    "state in half": ("state", {"state": torch.zeros(2, 3, 3, dtype=torch.float16)}),
    "state elsewhere": ("state", {"state": torch.zeros(2, 3, 3, **META)}),
    "packed batch of two": ("key", {"cu_seqlens": torch.tensor([0, 4])}),
    "no such backend": ("backend", {"backend": "abacus"}),
}
NOT_BOUNDS = {
    "one number": torch.tensor([0]),
    "a column": torch.tensor([[0], [4]]),
    "floats": torch.tensor([0.0, 4.0]),
    "starts late": torch.tensor([1, 4]),
    "ends early": torch.tensor([0, 2, 3]),
    "ends late": torch.tensor([0, 5]),
    "goes back": torch.tensor([0, 3, 2, 4]),
}


@pytest.mark.parametrize("reason", REFUSED)
def test_bad_input_is_refused_by_name(reason):
    name, change = REFUSED[reason]
    x = make(4, channels=3) | {"state": None}
    with pytest.raises(ValueError, match=rf"^{name} "):
        wkv4(**x | change)


@every_backend
@pytest.mark.parametrize("reason", NOT_BOUNDS)
def test_bad_bounds_are_refused(backend, reason):
    x = case(4, backend, channels=3, batch=1) | {
        "cu_seqlens": NOT_BOUNDS[reason].to(device_of(backend)),
        "state": None,
    }
    with pytest.raises(ValueError, match=r"^cu_seqlens "):
        wkv4(**x, backend=backend)


def test_a_state_must_fit_the_number_of_sequences():
    with pytest.raises(ValueError, match=r"^state .*\(2, 3, 37\).*\(5, 3, 37\)"):
        wkv4(**make(129, packed=True) | {"state": make(129)["state"]})
