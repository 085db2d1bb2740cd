"""Laws of what is between the matrix products: token shift and mixing, squared ReLU, gates."""

import pytest
import torch
from wkv4_cases import place

from modeling_rwkv.packing import Layout, Rows, arrange
from rwkv_kernels import loader, mixing
from rwkv_kernels.mixing import (
    DTYPES,
    gate,
    gate_reference,
    shift_and_mix,
    shift_and_mix_reference,
    squared_relu,
    squared_relu_reference,
)

SIZES = [(1, 1), (2, 37), (65, 96), (130, 31)]  # tokens and channels: less and more than a piece, and a vector
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
every_size = pytest.mark.parametrize(("time", "channels"), SIZES)
every_layout = pytest.mark.parametrize("packed", [False, True], ids=["rows", "packed"])
with_and_without_previous = pytest.mark.parametrize("past", [False, True], ids=["fresh", "continued"])


@pytest.fixture(autouse=True)
def native():
    """These laws hold of the references too, but would say nothing of the kernels."""
    if not mixing._can_load():
        pytest.skip("the kernels cannot be compiled here")


def random(*shape: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def layout_of(rows: int, time: int, packed: bool) -> Layout:
    """Rows; or the valid tokens of three sequences each, and of a row without any."""
    if not packed:
        return Rows()
    mask = torch.ones(rows + 1, time)
    mask[1] = 0
    mask[-1, : time // 2] = 0
    position = torch.arange(time) % max(1, time // 3)
    return arrange((rows + 1, time), mask, position.expand(rows + 1, time))[0]


def case(
    time: int, channels: int, dtype: torch.dtype, packed: bool, past: bool, mixes: int = 3, layout: str = "contiguous"
) -> tuple:
    """The arguments of ``shift_and_mix``; what a sliced layout skips is NaN."""
    where = layout_of(2, time, packed)
    shape = (2, time) if isinstance(where, Rows) else (1, len(where.token))
    sequences = 2 if isinstance(where, Rows) else len(where.row)
    x = place(random(*shape, channels, dtype=dtype), layout)
    previous = place(random(sequences, channels, dtype=dtype, seed=1), layout) if past else None
    weights = [torch.rand(1, 1, channels, generator=torch.Generator().manual_seed(i)).to(dtype) for i in range(mixes)]
    return x, previous, where, *(place(weight, layout) for weight in weights)


def error(actual: torch.Tensor, exact: torch.Tensor) -> float:
    return (actual.double() - exact).abs().max().item() if exact.numel() else 0.0


def doubled(arguments: tuple) -> list:
    return [a.double() if isinstance(a, torch.Tensor) else a for a in arguments]


def differentiate(function, *arguments):
    """Outputs, and the gradients of all tensors for cotangents that are the same numbers in every dtype."""
    leaves = [a.detach().requires_grad_() if isinstance(a, torch.Tensor) else a for a in arguments]
    outputs = function(*leaves)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    cotangents = [random(*y.shape, dtype=torch.bfloat16, seed=9 + i).to(y.dtype) for i, y in enumerate(outputs)]
    return [y.detach() for y in outputs], torch.autograd.grad(outputs, tensors, cotangents)


@every_dtype
@every_size
@every_layout
@with_and_without_previous
@pytest.mark.parametrize("mixes", [1, 2, 3])
def test_mixing_is_as_exact_as_the_reference(dtype, time, channels, packed, past, mixes):
    arguments = case(time, channels, dtype, packed, past, mixes)
    exact, exact_gradients = differentiate(shift_and_mix_reference, *doubled(arguments))
    outputs, gradients = differentiate(shift_and_mix, *arguments)
    plain, plain_gradients = differentiate(shift_and_mix_reference, *arguments)
    epsilon = torch.finfo(dtype).eps
    for y, ours, theirs in zip(exact, outputs, plain, strict=True):
        assert ours.dtype == dtype and error(ours, y) <= error(theirs, y) + epsilon
    for g, ours, theirs in zip(exact_gradients, gradients, plain_gradients, strict=True):
        assert ours.dtype == dtype and ours.shape == g.shape
        largest = g.abs().max().item() if g.numel() else 0
        assert error(ours, g) <= error(theirs, g) + 4 * epsilon * (1 + largest)


@every_dtype
@pytest.mark.parametrize("count", [0, 1, 31, 33, 5000])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_elements_are_as_exact_as_the_references(dtype, count, scale):
    x, receptance = 3 * random(count, dtype=dtype), 4 * random(count, dtype=dtype, seed=1)
    for function, reference, arguments in (
        (squared_relu, squared_relu_reference, (x, scale)),
        (gate, gate_reference, (receptance, x, scale)),
    ):
        exact = differentiate(reference, *doubled(arguments))
        ours, theirs = differentiate(function, *arguments), differentiate(reference, *arguments)
        for y, a, b in zip(*((*outputs, *gradients) for outputs, gradients in (exact, ours, theirs)), strict=True):
            slack = 4 * torch.finfo(dtype).eps * (1 + y.abs().max().item() if count else 0)
            assert a.dtype == dtype and a.shape == y.shape and error(a, y) <= error(b, y) + slack


def test_scaled_down_elements_do_not_overflow_on_the_way():
    x = torch.tensor([400.0, -400.0], dtype=torch.float16)
    assert squared_relu(x, 0.25).tolist() == [40000, 0]


@every_dtype
def test_what_is_not_finite(dtype):
    x = torch.tensor([torch.nan, torch.inf, -torch.inf, -0.0, 1e4, -1e4], dtype=dtype)
    one = torch.ones_like(x)
    torch.testing.assert_close(squared_relu(x), squared_relu_reference(x), equal_nan=True)
    torch.testing.assert_close(gate(x, one), gate_reference(x, one), equal_nan=True)
    torch.testing.assert_close(gate(one, x), gate_reference(one, x), equal_nan=True)
    x = x.expand(1, 2, 6)
    mixed = shift_and_mix(x, None, Rows(), 0.5 * one)
    torch.testing.assert_close(mixed, shift_and_mix_reference(x, None, Rows(), 0.5 * one), equal_nan=True)


@every_dtype
@with_and_without_previous
def test_a_sequence_is_the_same_alone_in_a_batch_packed_and_in_parts(dtype, past):
    x, previous, _, *mixes = case(130, 37, dtype, False, past)
    whole = shift_and_mix(x, previous, Rows(), *mixes)
    for row in range(2):
        before = previous[row : row + 1] if past else None
        alone = shift_and_mix(x[row : row + 1], before, Rows(), *mixes)
        first = shift_and_mix(x[row : row + 1, :67], before, Rows(), *mixes)
        rest = shift_and_mix(x[row : row + 1, 67:], x[row : row + 1, 66], Rows(), *mixes)
        for i, y in enumerate(whole):
            assert torch.equal(alone[i][0], y[row])
            assert torch.equal(torch.cat([first[i], rest[i]], dim=1)[0], y[row])
    layout, _ = arrange((1, 260), cu_seq_lens=torch.tensor([0, 130, 260]))
    for i, y in enumerate(shift_and_mix(x.reshape(1, 260, 37), previous, layout, *mixes)):
        assert torch.equal(y.view(2, 130, 37), whole[i])


@every_dtype
def test_an_element_is_the_same_wherever_it_is(dtype):
    a, b = random(5000, dtype=dtype), random(5000, dtype=dtype, seed=1)
    for at in (slice(0, 1), slice(1, 32), slice(7, 4999)):
        assert torch.equal(squared_relu(a, 0.5)[at], squared_relu(a[at], 0.5))
        assert torch.equal(gate(a, b, 0.5)[at], gate(a[at], b[at], 0.5))


@pytest.mark.parametrize("threads", [2, 5])
def test_threads_do_not_matter(threads):
    arguments = case(300, 200, torch.bfloat16, True, True)
    elements = 5 * arguments[0]
    before, results = torch.get_num_threads(), []
    try:
        for number in (1, threads):
            torch.set_num_threads(number)
            mixed = differentiate(shift_and_mix, *arguments)
            relu, gated = differentiate(squared_relu, elements), differentiate(gate, elements, elements)
            results.append([t for outputs, gradients in (mixed, relu, gated) for t in (*outputs, *gradients)])
    finally:
        torch.set_num_threads(before)
    for one, many in zip(*results, strict=True):
        assert torch.equal(one, many)


@every_layout
@pytest.mark.parametrize("layout", ["sliced", "transposed"])
def test_strides_do_not_matter_and_inputs_are_not_modified(packed, layout):
    dense = case(65, 37, torch.bfloat16, packed, True)
    strided = case(65, 37, torch.bfloat16, packed, True, layout=layout)
    before = [a.clone() if isinstance(a, torch.Tensor) else a for a in strided]
    for a, b in zip(differentiate(shift_and_mix, *strided), differentiate(shift_and_mix, *dense), strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    x = strided[0]
    assert torch.equal(squared_relu(x), squared_relu(dense[0])) and torch.equal(gate(x, x), gate(dense[0], dense[0]))
    for a, b in zip(strided, before, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a, b)


@every_dtype
@every_layout
def test_nothing_is_written_beside_the_results(monkeypatch, dtype, packed):
    """Every tensor that is allocated for a kernel lies between guards."""
    guarded = []

    def empty_like(x, dtype=None, memory_format=None):
        memory = torch.full((x.numel() + 128,), 7, dtype=dtype or x.dtype)
        guarded.append(memory)
        return memory[64:-64].view(x.shape)

    arguments = case(67, 37, dtype, packed, True)
    x, previous, layout, *mixes = arguments
    with monkeypatch.context() as patch:
        patch.setattr(mixing.torch, "empty_like", empty_like)
        outputs = mixing._shift_and_mix(x, previous, layout.cu_seqlens, mixes)
        mixing._shift_and_mix_backward(outputs, x, previous, layout.cu_seqlens, mixes)
        mixing._squared_relu_backward(mixing._squared_relu(x, 1.0), x, 1.0)
        mixing._gate_backward(mixing._gate(x, x, 1.0), x, x, 1.0)
    assert len(guarded) == 3 + 4 + 2 + 3
    for memory in guarded:
        assert (memory[:64] == 7).all() and (memory[-64:] == 7).all()


@every_layout
@with_and_without_previous
def test_gradients_are_those_of_finite_differences(packed, past):
    x, previous, layout, *mixes = (
        a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in case(5, 3, torch.float64, packed, past)
    )
    inputs = [x, *mixes] if previous is None else [x, *mixes, previous]
    assert torch.autograd.gradcheck(
        lambda x, a, b, c, previous=None: shift_and_mix(x, previous, layout, a, b, c), inputs
    )
    assert torch.autograd.gradcheck(lambda x: squared_relu(x, 0.5), [x])
    assert torch.autograd.gradcheck(
        lambda a, b: gate(a, b, 0.5), [x, random(*x.shape, dtype=x.dtype).requires_grad_()]
    )


@every_layout
@with_and_without_previous
def test_opcheck(packed, past):
    x, previous, layout, *mixes = (
        a.requires_grad_() if isinstance(a, torch.Tensor) else a for a in case(5, 3, torch.float32, packed, past)
    )
    torch.library.opcheck(torch.ops.rwkv.shift_and_mix.default, (x, previous, layout.cu_seqlens, mixes))
    torch.library.opcheck(torch.ops.rwkv.squared_relu.default, (x, 0.5))
    torch.library.opcheck(torch.ops.rwkv.gate.default, (x, x.detach().clone().requires_grad_(), 0.5))


def test_without_a_compiler_they_are_plain_pytorch(monkeypatch):
    arguments = case(65, 37, torch.float32, True, True)
    x = arguments[0]
    ours = *shift_and_mix(*arguments), squared_relu(x), gate(x, x)

    def missing(source):
        raise loader.Unavailable("no compiler")

    monkeypatch.setattr(loader, "cpu_library", missing)
    mixing._library.cache_clear()
    mixing._can_load.cache_clear()
    try:
        plain = *shift_and_mix(*arguments), squared_relu(x), gate(x, x)
        assert not mixing._can_load()
    finally:
        mixing._can_load.cache_clear()
    for a, b in zip(ours, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(3, 4)}, "x is"),
        ({"previous": torch.zeros(1, 4)}, "previous has shape"),
        ({"mixes": [torch.zeros(3)]}, "a mix has shape"),
        ({"mixes": []}, "0 mixes"),
        ({"mixes": [torch.zeros(4)] * 4}, "4 mixes"),
    ],
)
def test_arguments_that_do_not_fit(change, message):
    x = {"x": torch.zeros(2, 3, 4), "previous": None, "mixes": [torch.zeros(4)]} | change
    with pytest.raises(ValueError, match=message):
        shift_and_mix(x["x"], x["previous"], Rows(), *x["mixes"])


@pytest.mark.parametrize("bounds", [[0, 4], [1, 3], [0, 2, 1, 3], [0, -1, 3]])
def test_bounds_that_do_not_fit(bounds):
    class Wrong(Rows):
        cu_seqlens = torch.tensor(bounds)

    with pytest.raises(ValueError, match="cu_seqlens"):
        shift_and_mix(torch.zeros(1, 3, 4), None, Wrong(), torch.zeros(4))
