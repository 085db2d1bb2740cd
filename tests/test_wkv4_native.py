"""Laws of the native WKV-4 alone: memory around its results, cuts in time, what is compiled, what cannot be had."""

import subprocess
import sys
import warnings

import pytest
import torch
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from wkv4_cases import (
    DIFFERENTIABLE,
    EXACT,
    agree,
    bounds,
    device_of,
    differentiate,
    leaves,
    make,
    readout,
    require,
    runner,
)

from rwkv_kernels import loader, wkv4, wkv4_cpu, wkv4_cuda

NATIVE = {"cpu": wkv4_cpu, "cuda": wkv4_cuda}
native = pytest.mark.parametrize("backend", NATIVE)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=str)
GUARD = 64


def case(time, backend, **more):
    require(backend, more.get("dtype", torch.float32))
    return make(time, backend, **more)


@pytest.fixture
def guarded(monkeypatch):
    """Every result is allocated amid a guard band and full of NaN; afterwards the bands must be as they were."""
    buffers = []
    new_empty = torch.Tensor.new_empty

    def amid_guards(like, *shape):
        shape = shape[0] if shape and not isinstance(shape[0], int) else shape
        size = torch.Size(shape).numel()
        buffer = new_empty(like, size + 2 * GUARD).fill_(torch.nan)
        buffers.append((buffer, size))
        return buffer[GUARD : GUARD + size].view(shape)

    monkeypatch.setattr(torch.Tensor, "new_empty", amid_guards)
    monkeypatch.setattr(torch.Tensor, "new_zeros", lambda like, *shape: amid_guards(like, *shape).zero_())
    yield buffers
    monkeypatch.undo()
    for buffer, size in buffers:
        assert buffer[:GUARD].isnan().all() and buffer[GUARD + size :].isnan().all()


@native
@dtypes
@pytest.mark.parametrize("channels", [1, 2, 15, 16, 33, 64, 100])
@pytest.mark.parametrize("lengths", [(), (0, 1, 63, 64, 65, 0, 130)], ids=["dense", "packed"])
def test_nothing_is_written_beside_the_results(backend, dtype, channels, lengths, guarded):
    x = case(67, backend, dtype=dtype, channels=channels, lengths=lengths)
    keep = wkv4._run(backend, *(x[name] for name in DIFFERENTIABLE), x["cu_seqlens"], True)
    grads = wkv4._run_backward(
        backend, keep[0].clone(), keep[1].clone(), *(x[name] for name in DIFFERENTIABLE), x["cu_seqlens"], keep[2]
    )
    for result in (*keep, *grads):
        assert not result.isnan().any()
    assert len(guarded) >= 3 + 5


@pytest.mark.parametrize("lengths", [(2500,), (1024, 0, 1025, 3, 4097)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_cut_in_time_changes_nothing(lengths, dtype, monkeypatch):
    """With more threads than blocks of channels the CPU cuts time; results are the same but for rounding."""
    x = case(0, "cpu", lengths=lengths, channels=5, dtype=dtype)
    results = []
    for threads in (1, 3):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        output, state, grads = differentiate(x, runner("cpu"))
        results.append([output, readout(state), *grads.values()])
    for whole, cut in zip(*results, strict=True):
        scale = whole.double().norm()
        assert (cut.double() - whole.double()).norm() <= (5e-5 if dtype == torch.float32 else 1e-12) * scale
    assert not torch.equal(results[0][0], results[1][0])  # or nothing was cut


def test_where_time_is_cut_the_bits_are_still_those_of_a_sequence_alone(monkeypatch):
    require("cpu")
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    x = make(0, lengths=(7, 2500, 0, 1100), channels=5)
    output, state = wkv4.wkv4(**x, backend="cpu")
    begin, end = 7, 2507
    alone = x | {"key": x["key"][:, begin:end], "value": x["value"][:, begin:end], "state": x["state"][1:2]}
    agree(wkv4.wkv4(**alone | {"cu_seqlens": None}, backend="cpu"), (output[:, begin:end], state[1:2]), exact=True)
    agree(wkv4.wkv4(**alone | {"cu_seqlens": bounds((2500,))}, backend="cpu")[0], output[:, begin:end], exact=True)


@native
def test_a_view_that_negates_memory_is_read_as_it_looks(backend):
    x = case(31, backend)
    negated = {name: torch._neg_view(-x[name]) for name in ("key", "value", "time_first")}
    agree(wkv4.wkv4(**x | negated, backend=backend), wkv4.wkv4(**x, backend=backend), exact=True)
    inputs = leaves(x, ("value",))
    output, _ = wkv4.wkv4(**inputs, backend=backend)
    ones = torch.ones_like(output)
    for gradient in (torch._neg_view(ones), -ones):
        inputs["value"].grad = None
        output.backward(gradient, retain_graph=True)
        agree(inputs["value"].grad, -torch.autograd.grad(output, inputs["value"], ones, retain_graph=True)[0])


@native
def test_a_traced_call_is_no_constant(backend):
    x = case(31, backend)
    traced = make_fx(lambda key: wkv4.wkv4(**x | {"key": key}, backend=backend)[0])(x["key"])
    agree(traced(x["key"] + 1), wkv4.wkv4(**x | {"key": x["key"] + 1}, backend=backend)[0], exact=True)


@native
def test_derivatives_forwards_and_of_functions_are_those_of_autograd(backend):
    x = case(31, backend)
    inputs = leaves(x, ("key",))
    wkv4.wkv4(**inputs, backend=backend)[0].sum().backward()
    functional = torch.func.grad(lambda key: wkv4.wkv4(**x | {"key": key}, backend=backend)[0].sum())(x["key"])
    agree(functional, inputs["key"].grad)
    with torch.no_grad(), forward_ad.dual_level():
        dual = x | {"key": forward_ad.make_dual(x["key"], torch.ones_like(x["key"]))}
        tangent = forward_ad.unpack_dual(wkv4.wkv4(**dual, backend=backend)[0]).tangent
    agree(tangent.sum(), inputs["key"].grad.sum())


@native
@pytest.mark.parametrize("b", [1e-30, 1e-10, 1.0, 1e10, 1e30])
@pytest.mark.parametrize("time", [2, 130])
def test_a_past_of_any_weight_is_weighed_as_it_is(backend, b, time):
    """In the output and in the gradients of the state, beside the reference in float64."""
    x = case(time, backend, batch=1, channels=4)
    x["state"] = torch.stack([x["value"][:, 0] * b, x["value"][:, 0] * 0 + b, x["key"][:, 0]], dim=1)
    output, end, grads = differentiate(x, runner(backend))
    double = {name: t if t is None else t.double().cpu() for name, t in x.items()}
    expected, expected_end, expected_grads = differentiate(double, lambda x: wkv4.wkv4_reference(**x))
    agree(output.double().cpu(), expected, dtype=torch.float32)
    agree(readout(end).double().cpu(), readout(expected_end), dtype=torch.float32)
    agree(grads["state"].double().cpu() * b, expected_grads["state"] * b, dtype=torch.float32)


@native
def test_the_gradient_of_a_token_fades_with_the_gap_to_the_next_key(backend):
    x = case(2, backend, batch=1, channels=3) | {"state": None}
    x["key"][:, 0], x["key"][:, 1] = 0.0, torch.tensor([10.0, 45.0, 60.0], device=x["key"].device)
    x["time_first"] = torch.zeros_like(x["time_first"])
    inputs = leaves(x | {"state": torch.zeros(1, 3, 3, device=x["key"].device)}, ("value",))
    output, _ = wkv4.wkv4(**inputs, backend=backend)
    output[:, 1].sum().backward()
    share = torch.tensor([10.0, 45.0, 60.0], dtype=torch.float64).neg().exp()
    torch.testing.assert_close(inputs["value"].grad[0, 0].double().cpu(), share / (1 + share), rtol=1e-4, atol=0)


@native
@pytest.mark.parametrize("time", [1, 130])
@pytest.mark.parametrize("bonus", [-30.0, 0.0, 30.0])
def test_a_value_may_be_as_large_as_its_dtype_allows(backend, bonus, time):
    x = case(time, backend, batch=1) | {"state": None}
    x["value"], x["time_first"] = torch.full_like(x["value"], 1e36), x["time_first"] + bonus
    agree(wkv4.wkv4(**x, backend=backend)[0], x["value"])


@native
@pytest.mark.parametrize("scale", [1e-25, 1e25])
@pytest.mark.parametrize("time", [31, 130])
def test_a_state_may_be_scaled_as_far_as_its_dtype_reaches(backend, scale, time):
    """And so may its gradient, which is that of the values it stands for."""
    x = case(time, backend)
    scaled = x["state"].clone()
    scaled[:, :2] *= scale
    scaled[:, 2] -= torch.tensor(scale, dtype=torch.float64).log().float()
    results = []
    for state in (x["state"], scaled):
        inputs = leaves(x | {"state": state})
        output, end = wkv4.wkv4(**inputs, backend=backend)
        (output.sum() + readout(end).sum()).backward()
        results.append(
            (
                output.detach(),
                readout(end).detach(),
                inputs["state"].grad[:, :2] * (state[:, 1:2] / x["state"][:, 1:2]).nan_to_num(),
            )
        )
    agree(*results)


@native
def test_a_channel_of_nan_stays_alone(backend):
    x = case(129, backend, channels=40)
    output, state, grads = differentiate(x, runner(backend))
    x["key"][:, 60, 7] = torch.nan
    ill, ill_state, ill_grads = differentiate(x, runner(backend))
    others = torch.arange(40) != 7
    exact = backend in EXACT
    agree(ill[..., others], output[..., others], exact)
    agree(readout(ill_state[..., others]), readout(state[..., others]), exact)
    for name in DIFFERENTIABLE:
        agree(ill_grads[name][..., others], grads[name][..., others], exact)
    assert ill[:, 60:, 7].isnan().all() and not ill[:, :60].isnan().any()


@native
def test_a_graph_or_a_thread_pool_of_another_size_does_not_matter(backend):
    x = case(1000, backend, channels=130)
    expected = wkv4.wkv4(**x, backend=backend)
    threads = torch.get_num_threads()
    try:
        for n in (1, 2, 5):
            torch.set_num_threads(n)
            agree(wkv4.wkv4(**x, backend=backend), expected, exact=True)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("backend", ["cpu"])
def test_a_step_has_the_bits_of_the_whole(backend):
    """Not on a GPU, where exponents are powers of two inside and powers of e in a state."""
    x = case(200, backend, dtype=torch.bfloat16)
    output, end = wkv4.wkv4(**x, backend=backend)
    state = x["state"]
    for t in range(200):
        y, state = wkv4.wkv4(**x | {"key": x["key"][:, t : t + 1], "value": x["value"][:, t : t + 1], "state": state})
        agree(y[:, 0], output[:, t], exact=True)
    agree(state, end, exact=True)


@pytest.mark.parametrize("backend", NATIVE)
def test_a_backend_for_another_device_is_refused(backend):
    x = make(4, channels=3)
    elsewhere = {n: None if t is None else t.to("meta") for n, t in x.items()}
    with pytest.raises(ValueError, match=rf"^backend is '{backend}' but key is on meta"):
        wkv4.wkv4(**elsewhere, backend=backend)


@pytest.fixture
def nothing_to_be_had(monkeypatch):
    """A machine without compilers."""

    def unavailable(device):
        raise loader.Unavailable("No compiler. Install one.")

    monkeypatch.setattr(wkv4_cpu, "load", unavailable)
    monkeypatch.setattr(wkv4_cpu, "forward", lambda *_: unavailable(None))
    wkv4._tried_to_load.cache_clear()
    yield
    wkv4._tried_to_load.cache_clear()


def test_without_a_compiler_one_warning_says_why(nothing_to_be_had):
    x = make(31)
    with pytest.warns(RuntimeWarning, match=r"portable.*No compiler\. Install one\.") as caught:
        results = [wkv4.wkv4(**x) for _ in range(2)]
    agree(results[0], wkv4.wkv4(**x, backend="portable"), exact=True)
    assert len(caught) == 1 and caught[0].filename == __file__
    with pytest.raises(RuntimeError, match=r"No compiler\. Install one\."):
        wkv4.wkv4(**x, backend="cpu")


def test_nothing_is_compiled_before_it_is_needed(tmp_path):
    code = (
        "import rwkv_kernels.wkv4, modeling_rwkv, pathlib, sys; assert not list(pathlib.Path(sys.argv[1]).iterdir())"
    )
    subprocess.run(
        [sys.executable, "-c", code, tmp_path], check=True, env={"RWKV_CACHE_DIR": str(tmp_path), "PATH": ""}
    )


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize(
    ("dtype", "width"), [(dtype, width) for dtype in wkv4_cuda.DTYPES for width in wkv4_cuda.widths(dtype)], ids=str
)
def test_every_cuda_kernel_compiles_without_a_warning(arch, dtype, width):
    code = loader.cubin("wkv4_cuda.cu", arch, wkv4_cuda.defines(dtype, width), warnings_are_errors=True)
    for plan in wkv4_cuda.PLANS:
        assert f"wkv4_{plan}\0".encode() in code


def test_sequences_are_cut_where_whole_ones_leave_a_gpu_idle():
    def is_cut(batch, time, channels):
        return wkv4_cuda.is_cut(batch * time, time, -(-channels // 64), processors=132)

    assert is_cut(1, 8192, 2560) and is_cut(1, 1024, 768) and is_cut(8, 1024, 768)
    assert not is_cut(8, 1024, 2048) and not is_cut(32, 1024, 768) and not is_cut(4, 4096, 5120)
    assert not is_cut(1, 32, 768)  # one tile
    assert is_cut(1, 32 * 65535, 768) and not is_cut(1, 32 * 65535 + 1, 768)  # a grid has no more rows of blocks


def test_more_tokens_than_an_integer_counts_are_refused():
    key = torch.empty(2, 2**30, 1, device="meta")
    with pytest.raises(ValueError, match="2147483648 tokens"):
        wkv4_cuda.forward(*key.new_empty(2, 1), key, key, key.new_empty(2, 3, 1), None, key.new_empty(0))


def test_auto_takes_the_native_one_and_warns_of_nothing():
    require("cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype in wkv4_cpu.DTYPES:
            assert wkv4.choose_backend(torch.empty(1, 1, 1, dtype=dtype)) == "cpu"
    assert wkv4.choose_backend(torch.empty(1, 1, 1, device="meta")) == "portable"
    assert device_of("cuda") == "cuda"


def test_a_cuda_graph_replays_a_call_and_its_gradients():
    """On a stream of its own; with new numbers in the old places."""
    x = case(500, "cuda", batch=1, channels=64, dtype=torch.bfloat16)
    inputs = [leaves(x)[name] for name in DIFFERENTIABLE]
    gradient = torch.randn_like(x["key"])

    def step():
        output, _ = wkv4.wkv4(*inputs, backend="cuda")
        return output, *torch.autograd.grad(output, inputs, gradient)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    with torch.no_grad():
        inputs[2].copy_(torch.randn_like(inputs[2]))
    graph.replay()
    agree([r.detach() for r in results], [r.detach() for r in step()], exact=True)


def test_a_hundred_thousand_tokens_on_a_gpu():
    x = case(100_000, "cuda", batch=1, channels=3)
    x["time_decay"] = torch.tensor([-8.0, -3.0, 1.0], device="cuda")
    output, state, grads = differentiate(x, runner("cuda"))
    double = {name: t.double() if t is not None else None for name, t in x.items()}
    expected, expected_state, expected_grads = differentiate(double, runner("portable"))
    agree(output.double(), expected, dtype=torch.float32)
    agree(readout(state).double(), readout(expected_state), dtype=torch.float32)
    for name in ("key", "value", "time_first"):
        assert (grads[name].double() - expected_grads[name]).norm() <= 1e-4 * expected_grads[name].norm(), name


def test_more_than_2_to_the_31_elements():
    require("cuda", torch.bfloat16)
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("takes 40 GiB of GPU memory")
    rows, time, channels = 2200, 1000, 1000
    key = torch.randn(rows, time, channels, device="cuda", dtype=torch.bfloat16)
    value = torch.randn(rows, time, channels, device="cuda", dtype=torch.bfloat16)
    decay, first = torch.linspace(-6, 1, channels, device="cuda"), torch.zeros(channels, device="cuda")
    assert key.numel() > 2**31
    output, state = wkv4.wkv4(decay, first, key, value, backend="cuda")
    alone, end = wkv4.wkv4(decay, first, key[-1:], value[-1:], backend="cuda")
    agree(output[-1:], alone, dtype=torch.bfloat16)
    agree(readout(state[-1:]), readout(end))
