"""Laws of how the WKV-4 operator sits in PyTorch: memory, steps, compilation, fake tensors."""

import contextlib
import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from wkv4_cases import (
    DIFFERENTIABLE,
    FAST,
    agree,
    bounds,
    cotangents,
    device_of,
    differentiate,
    leaves,
    make,
    readout,
    require,
    runner,
)

from rwkv_kernels import wkv4_portable
from rwkv_kernels.wkv4 import BACKENDS, wkv4

every_backend = pytest.mark.parametrize("backend", BACKENDS)
fast_backends = pytest.mark.parametrize("backend", FAST)
dense_and_packed = pytest.mark.parametrize("packed", [False, True], ids=["dense", "packed"])


def case(time, backend, **more):
    require(backend, more.get("dtype", torch.float32))
    return make(time, backend, **more)


def memory(tensor):
    """Every byte of what ``tensor`` is a view of."""
    storage = tensor.untyped_storage()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(storage)


@every_backend
@pytest.mark.parametrize("time", [0, 1, 31, 129])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@dense_and_packed
def test_inputs_are_never_modified(backend, time, layout, packed):
    x = leaves(case(time, backend, layout=layout, packed=packed and time > 0))
    cotangent = cotangents(x)
    watched = [t for t in (*x.values(), *cotangent) if t is not None]
    before = [memory(t.detach()).clone() for t in watched]
    output, state = wkv4(**x, backend=backend)
    inputs = [x[name] for name in DIFFERENTIABLE]
    torch.autograd.grad([output, readout(state)], inputs, cotangent, allow_unused=True)
    for tensor, bytes_before in zip(watched, before, strict=True):
        assert torch.equal(memory(tensor.detach()), bytes_before)
        assert tensor.data_ptr() not in (output.data_ptr(), state.data_ptr()) or not tensor.numel()


@contextlib.contextmanager
def memory_full_of_nan():
    torch.use_deterministic_algorithms(True)
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all()
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(False)


@every_backend
@pytest.mark.parametrize("time", [1, 31, 129, 1000])
@dense_and_packed
def test_nothing_is_read_before_it_is_written(backend, time, packed):
    x = case(time, backend, packed=packed)
    expected = differentiate(x, runner(backend))
    with memory_full_of_nan():
        agree(differentiate(x, runner(backend)), expected, exact=True)


def graph(*outputs):
    """All autograd nodes from ``outputs`` down to the leaves."""
    nodes, todo = set(), [output.grad_fn for output in outputs]
    while todo:
        node = todo.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            todo.extend(parent for parent, _ in node.next_functions)
    return nodes


@fast_backends
@dense_and_packed
def test_what_backward_needs_does_not_grow_with_steps(backend, packed):
    """Its graph has one node, whatever T is, and keeps no more than the inputs and the results."""
    sizes = set()
    for time in (31, 129, 1000):
        x = leaves(case(time, backend, packed=packed, dtype=torch.bfloat16))
        kept = {}

        def pack(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output, state = wkv4(**x, backend=backend)
        sizes.add(len(graph(output, state)))
        fp32_rows = 4 * time * 37 * len(x["key"]) // 16  # per-tile states, should a backend keep any
        known = sum(t.nbytes for t in (*x.values(), output, state) if t is not None)
        assert sum(kept.values()) <= known + fp32_rows
    assert len(sizes) == 1 and sizes.pop() <= 1 + len(DIFFERENTIABLE)


class Count(TorchDispatchMode):
    """How many operations ran, and how large the largest result was."""

    def __init__(self):
        super().__init__()
        self.operations = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        self.operations += 1
        if isinstance(result, torch.Tensor):
            self.largest = max(self.largest, result.numel())
        return result


@pytest.mark.parametrize("packed", [False, True])
def test_portable_steps_grow_at_most_with_the_root_of_time(packed):
    """At most 2 sqrt(T) steps of some ten operations each way; and no temporary beyond O(T C).

    A reshape, a view or a shape query counts as an operation, so the constants are generous; a
    loop over T would need thousands more.
    """
    for time in (1024, 16_384, 65_536):
        lengths = (0, 1, 3, time - 105, 0, 31, 32, 33, 5) if packed else ()
        x = make(time, batch=1, channels=3, lengths=lengths)
        arguments = tuple(x.values())
        with Count() as forward:
            output, state = wkv4_portable.forward(*arguments, tiles=torch.empty(0))
        with Count() as backward:
            wkv4_portable.backward(output, state, *arguments, tiles=torch.empty(0))
        assert forward.operations <= 20 * 2 * math.sqrt(time) + 100
        assert backward.operations <= 20 * 4 * math.sqrt(time) + 200
        assert max(forward.largest, backward.largest) <= 2 * 1.1 * (time + 32 * len(lengths)) * 3


def registered(backend, x):
    """The op of a backend and of its gradient, each with arguments."""
    forward = getattr(torch.ops.rwkv, f"wkv4_{backend}").default
    arguments = tuple(x[name] for name in (*DIFFERENTIABLE, "cu_seqlens"))
    return forward, arguments


@fast_backends
@pytest.mark.parametrize("time", [0, 31, 65])
@pytest.mark.parametrize("layout", ["contiguous", "sliced", "transposed"])
@dense_and_packed
def test_opcheck(backend, time, layout, packed):
    lengths = (0, 1, 29, 1, 0) if packed and time == 31 else (0, 64, 1) if packed and time else ()
    dtype = torch.float32 if layout == "contiguous" else torch.bfloat16
    x = case(time, backend, layout=layout, channels=3, lengths=lengths, dtype=dtype)
    if layout == "transposed":
        x["time_first"] = x["time_first"].half()
    op, arguments = registered(backend, leaves(x))
    torch.library.opcheck(op, arguments)
    op = getattr(torch.ops.rwkv, f"wkv4_{backend}_backward").default
    forward, arguments = registered(backend, x)
    output, state, tiles = forward(*arguments)
    torch.library.opcheck(op, (output, state, *arguments, tiles))


def loss(time_decay, time_first, key, value, state, cu_seqlens, backend):
    """With work before and after, that a compiler must carry gradients through."""
    output, state = wkv4(time_decay, time_first, key * 0.5, value, state, cu_seqlens, backend)
    return (output.sigmoid() ** 2).sum() + readout(state).square().sum()


@fast_backends
@pytest.mark.parametrize("compiler", ["eager", "aot_eager"])
@dense_and_packed
def test_compiles_without_a_graph_break_for_any_length(backend, compiler, packed):
    torch._dynamo.reset()
    compiled = torch.compile(loss, fullgraph=True, backend=compiler, dynamic=True)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for lengths in ((5, 0, 3), (40, 7, 0), (1, 1, 70)):
            x = case(sum(lengths), backend, channels=5, lengths=lengths if packed else ())
            results = []
            for run in (loss, compiled):
                inputs = leaves(x)
                value = run(**inputs, backend=backend)
                value.backward()
                results.append([value.detach(), *(inputs[n].grad for n in DIFFERENTIABLE)])
            agree(*results)


@fast_backends
def test_compiles_a_single_step(backend):
    torch._dynamo.reset()
    x = case(1, backend)
    step = torch.compile(wkv4, fullgraph=True, backend="aot_eager")
    agree(step(**x, backend=backend), wkv4(**x, backend=backend))
    agree(step(**x | {"state": None}, backend=backend), wkv4(**x | {"state": None}))


@fast_backends
def test_a_compiled_call_refuses_bad_bounds_too(backend):
    torch._dynamo.reset()
    x = case(0, backend, lengths=(3, 4))
    compiled = torch.compile(wkv4, fullgraph=True, backend="eager")
    compiled(**x, backend=backend)
    with pytest.raises(ValueError, match=r"^cu_seqlens "):
        compiled(**x | {"cu_seqlens": bounds((4, 4)).to(device_of(backend))}, backend=backend)


@pytest.mark.parametrize("where", ["meta", "fake"])
@pytest.mark.parametrize("time", [1, 31])
@dense_and_packed
def test_shapes_without_data(where, time, packed):
    x = make(time, packed=packed, dtype=torch.bfloat16)
    expected = wkv4(**x)
    with FakeTensorMode() if where == "fake" else contextlib.nullcontext() as mode:
        for state in (x["state"], None):
            move = mode.from_tensor if mode else (lambda t: t.to("meta"))
            inputs = {n: None if t is None else move(t) for n, t in (x | {"state": state}).items()}
            inputs["value"].requires_grad_()
            results = wkv4(**inputs)
            results[0].sum().backward()
            assert inputs["value"].grad.shape == x["value"].shape
            for result, real in zip(results, expected, strict=True):
                assert result.shape == real.shape and result.dtype == real.dtype
                assert result.device.type == ("meta" if where == "meta" else "cpu")
