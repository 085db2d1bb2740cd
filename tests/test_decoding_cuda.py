"""Laws about the next token on a GPU. Kernels run from their source on a CPU, thread by thread; some need a GPU."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from cuda_on_cpu import decoding_emulated
from models import agree, contents, make, padded, read, same, text
from torch import nn
from torch._dynamo.testing import CompileCounter

from modeling_rwkv import RwkvCache, RwkvStaticCache, decoding
from rwkv_kernels import decode_cuda, loader

# Channels are whole pieces of 16 bytes; a thread of the emulated blocks has one four of channels, or two.
SHAPES = {
    "odd": {"hidden_size": 40, "attention_hidden_size": 56, "intermediate_size": 104, "num_hidden_layers": 3},
    "narrow": {"hidden_size": 16, "attention_hidden_size": 8, "intermediate_size": 24, "num_hidden_layers": 1},
    "two fours": {"hidden_size": 264, "attention_hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2},
}
SHAPES = {name: shape | {"vocab_size": 61, "rescale_every": 2} for name, shape in SHAPES.items()}
PLAIN = SHAPES["odd"]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("decoding")


@pytest.fixture
def launches(folder):
    with decoding_emulated(folder, processors=3) as names:
        yield names


@pytest.mark.parametrize("rows", [1, 2, 3, decode_cuda.MOST_ROWS + 1])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_states_are_those_of_the_modules(shape, rows, launches):
    model = make(SHAPES[shape])
    ids = text(rows, 6, model.config.vocab_size)
    (logits, cache), (expected, other) = read(model, ids), read(model, ids, native=False)
    layers = model.config.num_hidden_layers
    few = ["decode_cuda"] * 3
    many = (["enter_attention", "attend", "enter_feed_forward", "square"] * layers + ["enter_head"]) * 3
    assert launches == (few if rows <= decode_cuda.MOST_ROWS else many)
    agree(logits, expected, atol=1e-4)
    agree(contents(cache), contents(other), atol=1e-4)
    assert cache.has_read(ids) and cache.seen_tokens == 6


@pytest.mark.parametrize("rows", [2, decode_cuda.MOST_ROWS + 1])
def test_in_bfloat16_it_errs_no_more_than_the_modules(rows, launches):
    model = make(PLAIN, dtype=torch.bfloat16)
    ids = text(rows, 9, model.config.vocab_size)
    (logits, cache), (ordinary, other) = read(model, ids), read(model, ids, native=False)
    assert launches and logits.dtype == torch.bfloat16
    exact, _ = read(model.double(), ids)
    assert [[x.dtype for x in layer] for layer in cache.layers] == [[x.dtype for x in layer] for layer in other.layers]
    assert (logits.double() - exact).norm() <= (ordinary.double() - exact).norm()


def test_bits_do_not_depend_on_the_number_of_multiprocessors(folder):
    results = []
    for processors in (1, 2, 5):
        with decoding_emulated(folder, processors):
            logits, cache = read(make(PLAIN), text(2, 6))
            results.append([logits, *contents(cache)])
    same(results[1], results[0])
    same(results[2], results[0])


def test_vectors_may_be_of_more_bits_than_matrices(launches):
    model = make(PLAIN, dtype=torch.bfloat16)
    for name, x in model.named_parameters():
        if "ln" in name or "time_mix" in name:
            x.data = x.data.float()
    (logits, _), (ordinary, _) = read(model, text(2, 9)), read(model, text(2, 9), native=False)
    exact, _ = read(model.double(), text(2, 9))
    assert launches and (logits.double() - exact).norm() <= (ordinary.double() - exact).norm()


def test_what_embeddings_make_of_ids_is_what_is_read(launches):
    class Rolled(nn.Embedding):
        def forward(self, ids):
            return super().forward(ids).roll(1, -1)

    model, ids = make(PLAIN), text(2, 5)
    plain, _ = read(model, ids)
    model.set_input_embeddings(Rolled.from_pretrained(model.get_input_embeddings().weight))
    (logits, _), (expected, _) = read(model, ids), read(model, ids, native=False)
    assert len(launches) == 2 * 2 and not torch.allclose(plain, expected, atol=1e-2)
    agree(logits, expected, atol=1e-4)


def _one_vector_of_other_bits(model):
    model.rwkv.blocks[1].ln1.weight.data = model.rwkv.blocks[1].ln1.weight.data.bfloat16()


def _bias(model):
    model.head.bias = nn.Parameter(torch.ones(model.config.vocab_size))


def _unaligned(model):
    weight = model.rwkv.blocks[0].attention.key.weight
    weight.data = torch.cat([torch.zeros(1), weight.data.flatten()])[1:].view_as(weight)


def _one_matrix_of_int8(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model.rwkv.blocks[1].feed_forward, torchao.Int8WeightOnlyConfig())


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (_one_matrix_of_int8, "int8"),
        (_one_vector_of_other_bits, "one of each"),
        (_bias, "bias"),
        (_unaligned, "multiple of 16"),
    ],
)
def test_what_the_kernels_do_not_take_is_left_to_the_modules(change, reason, launches):
    model, ids = make(PLAIN), text(2, 5)
    change(model)
    (logits, cache), (expected, other) = read(model, ids), read(model, ids, native=False)
    same([logits, *contents(cache)], [expected, *contents(other)])
    assert not launches and reason in decoding.why_not(model)


def test_sizes_that_are_no_whole_pieces_are_left_to_the_modules(launches):
    model = make(PLAIN | {"hidden_size": 42})
    read(model, text(1, 5))
    assert not launches and "16 bytes" in decoding.why_not(model)


def test_a_static_cache_is_written_over_and_its_clone_is_not(launches):
    model, ids = make(SHAPES["narrow"]), text(2, 7)
    expected, _ = read(model, ids)
    logits, cache = read(model, ids, cache=RwkvStaticCache())
    same(logits, expected)
    clone, addresses = cache.clone(), set()
    kept = [x.clone() for x in contents(clone)]
    with torch.no_grad():
        for token in ids.T:
            model(token[:, None], past_key_values=cache, use_cache=True)
            addresses.add(tuple(x.data_ptr() for x in cache.stack))
    assert len(addresses) == 2
    same(contents(clone), kept)
    with torch.no_grad():
        one = model(ids[:, :1], past_key_values=clone, use_cache=True).logits
    same(one, read(model, torch.cat([ids, ids[:, :1]], 1), cache=RwkvStaticCache())[0][:, -1:])


def test_who_captures_tokens_in_a_graph_shares_no_counters(launches, monkeypatch):
    """Those of a graph are zeroed when it runs, those of a stream once."""
    model = make(PLAIN)
    read(model, text(1, 5))
    room = decoding._plan_of(model).decoder._room
    of_the_stream = {x.data_ptr() for x in room(1)}
    assert {x.data_ptr() for x in room(1)} == of_the_stream
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    one, other = room(1), room(1)
    assert len({x.data_ptr() for x in one + other} | of_the_stream) == 3 * len(one)


def test_a_batch_may_have_more_rows_than_a_grid_is_high(launches, monkeypatch):
    model, rows, grids = make(SHAPES["narrow"]), 2**16 + 1, []
    read(model, text(1, 5))
    decoder = decoding._plan_of(model).decoder
    monkeypatch.setattr(loader, "launch", lambda kernel, blocks, *_: grids.append(blocks))
    states = decode_cuda.Stack(torch.zeros(1, rows, 16), torch.zeros(1, rows, 16), torch.zeros(1, rows, 3, 8))
    decoder.step(torch.zeros(rows, 1, dtype=torch.int64), model.rwkv.embeddings.weight.detach(), states, states)
    assert grids and max(height for _, height in grids) < 2**16


OPTIONS = ({}, {"num_beams": 3}, {"num_return_sequences": 2, "do_sample": True})


@pytest.mark.parametrize("options", OPTIONS)
def test_generation_with_a_static_cache_writes_the_same(options):
    model = make(PLAIN)
    ids, mask = padded([row[:n] for row, n in zip(text(2, 9), (4, 9), strict=True)])
    written = []
    for cache in ({}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        result = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=8,
            pad_token_id=0,
            return_dict_in_generate=True,
            **cache,
            **options,
        )
        written.append(result.sequences)
        assert type(result.past_key_values) is (RwkvStaticCache if cache else RwkvCache)
    same(*written)


def test_a_step_compiles_whole_and_not_again():
    """A graph break would raise: nothing in it waits for numbers of the device, nor has sizes that depend on them."""
    model, ids = make(PLAIN), text(2, 9)
    counter = CompileCounter()
    step = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        cache = model(ids[:, :3], use_cache=True).past_key_values
        logits = [step(token[:, None], past_key_values=cache, use_cache=True).logits for token in ids[:, 3:].T]
    agree(torch.cat(logits, 1), read(model, ids)[0], atol=1e-4)
    assert counter.frame_count <= 2  # the second one for any position


@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "sm_100"])
@pytest.mark.parametrize("dtype", decode_cuda.DTYPES)
def test_the_kernels_compile_without_warnings(arch, dtype):
    for source, rows in (("decode_cuda.cu", 1), ("decode_cuda.cu", decode_cuda.MOST_ROWS), ("decode_rows.cu", 1)):
        macros = decode_cuda.defines((dtype, dtype, torch.float32), rows, 768)
        assert loader.cubin(source, arch, macros, warnings_are_errors=True)


# On a GPU.

HERE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@on_a_gpu
@pytest.mark.parametrize("rows", [1, decode_cuda.MOST_ROWS, decode_cuda.MOST_ROWS + 1, 70])
@pytest.mark.parametrize("dtype", DTYPES)
def test_on_a_gpu_it_errs_no_more_than_the_modules(dtype, rows):
    model = make(PLAIN | {"hidden_size": 520}, dtype=dtype).to(HERE)
    ids = text(rows, 12).to(HERE)
    (logits, _), (ordinary, _) = read(model, ids), read(model, ids, native=False)
    static, _ = read(model, ids, cache=RwkvStaticCache())
    exact, _ = read(model.double(), ids)
    allowed = 1.5 * (ordinary.double() - exact).norm()
    assert (logits.double() - exact).norm() <= allowed and (static.double() - exact).norm() <= allowed


@on_a_gpu
@pytest.mark.parametrize("rows", [1, decode_cuda.MOST_ROWS + 1])
@pytest.mark.parametrize("options", OPTIONS)
def test_on_a_gpu_generation_with_a_static_cache_writes_the_same(options, rows):
    model, ids = make(PLAIN).to(HERE), text(rows, 9).to(HERE)
    written = []
    for cache in ({}, {"cache_implementation": "static"}):
        torch.manual_seed(5)
        written.append(model.generate(ids, max_new_tokens=20, pad_token_id=0, **cache, **options))
    same(*written)


@on_a_gpu
@pytest.mark.parametrize("rows", [1, decode_cuda.MOST_ROWS, decode_cuda.MOST_ROWS + 3])
def test_on_a_gpu_graphs_are_captured_once_and_caches_take_turns_in_them(rows, monkeypatch):
    captured = []
    graph = torch.cuda.graph
    monkeypatch.setattr(torch.cuda, "graph", lambda *args, **kwargs: captured.append(1) or graph(*args, **kwargs))
    model = make(PLAIN).to(HERE)
    texts = [text(rows, 9, seed=seed).to(HERE) for seed in (1, 2)]
    expected = [read(model, ids)[0] for ids in texts]
    with torch.no_grad():
        caches = [RwkvStaticCache(), RwkvStaticCache()]
        for ids, cache in zip(texts, caches, strict=True):
            model(ids[:, :3], past_key_values=cache, use_cache=True)
        for i in range(3, 9):
            for ids, cache, logits in zip(texts, caches, expected, strict=True):
                one = model(ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits
                agree(one[:, 0], logits[:, i - 3], atol=1e-4)
    model.generate(texts[0], max_new_tokens=5, pad_token_id=0, cache_implementation="static")
    assert len(captured) == 1


@on_a_gpu
def test_on_a_gpu_threads_write_what_each_would_alone():
    """All of them six rows, and so in one graph."""
    model = make(PLAIN).to(HERE)
    ways = {"num_beams": 3}, {"num_return_sequences": 3, "num_beams": 3}, {}, {"num_beams": 2}
    texts = [text(rows, 9, seed=rows).to(HERE) for rows in (2, 2, 6, 3)]

    def written(ids, way):
        options = {"max_new_tokens": 40, "eos_token_id": None, "pad_token_id": 0, "do_sample": False}
        result = model.generate(ids, cache_implementation="static", return_dict_in_generate=True, **options, **way)
        return [result.sequences, *contents(result.past_key_values.clone())]

    expected = [written(*work) for work in zip(texts, ways, strict=True)]
    model.rwkv.embeddings.weight.data = model.rwkv.embeddings.weight.data.clone()  # nothing is captured yet
    with ThreadPoolExecutor(len(texts)) as pool:
        for _ in range(5):
            for found, alone in zip(pool.map(written, texts, ways), expected, strict=True):
                agree(found, alone, atol=1e-4)
    assert any(decoding._plan_of(model).replays.values())


@on_a_gpu
@pytest.mark.parametrize("rows", [2, decode_cuda.MOST_ROWS + 1])
def test_on_a_gpu_a_state_may_be_asked_for_on_another_stream(rows):
    """Which is behind: what the graph's own stream writes next is not to be seen there."""
    model, ids, stream = make(PLAIN).to(HERE), text(rows, 9).to(HERE), torch.cuda.Stream()
    cache, other = (read(model, ids, cache=RwkvStaticCache())[1] for _ in range(2))
    read(model, ids[:, :2], cache=cache, begin=1)
    expected = [x.clone() for x in contents(cache.clone())]
    read(model, ids[:, :2], cache=other, begin=1)
    with torch.cuda.stream(stream):
        torch.cuda._sleep(200_000_000)
        kept = other.clone()
    for going_on in (cache, other):
        read(model, ids, cache=going_on, begin=1)
    torch.cuda.synchronize()
    agree(contents(kept), expected, atol=1e-5)
    assert kept.has_read(torch.cat([ids, ids[:, :2]], 1))


@on_a_gpu
@pytest.mark.parametrize("rows", [1, decode_cuda.MOST_ROWS + 1])
def test_on_a_gpu_a_change_between_two_texts_is_seen(rows):
    model = make(PLAIN).to(HERE)
    ids = text(rows, 9).to(HERE)
    before, _ = read(model, ids, cache=RwkvStaticCache())
    for change in (lambda x: x.data.mul_(1.5), lambda x: setattr(x, "data", x.data * 1.5)):
        change(model.rwkv.blocks[0].attention.output.weight)
        after, _ = read(model, ids, cache=RwkvStaticCache())
        agree(after, read(model, ids, native=False)[0], atol=1e-4)
        assert not torch.allclose(before, after, atol=1e-3)
        before = after


@on_a_gpu
def test_on_a_gpu_adapters_are_replayed_and_hooks_are_heard():
    peft = pytest.importorskip("peft")
    model, ids = make(PLAIN).to(HERE), text(3, 9).to(HERE)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["key"], init_lora_weights=False))
    adapted.eval()
    static, cache = read(model, ids, cache=RwkvStaticCache())
    assert any(cache.plan[1].replays.values())
    agree(static, read(model, ids, native=False)[0], atol=1e-4)
    with adapted.disable_adapter():
        static, _ = read(model, ids, cache=RwkvStaticCache())
        agree(static, read(model, ids, native=False)[0], atol=1e-4)
    heard = []
    model.rwkv.blocks[0].register_forward_hook(lambda *_: heard.append(1))
    read(model, ids, cache=RwkvStaticCache())
    assert len(heard) == 7


@on_a_gpu
def test_on_a_gpu_a_token_can_be_captured_in_a_graph_of_somebody_else():
    model, ids = make(PLAIN).to(HERE), text(2, 9).to(HERE)
    with torch.no_grad():
        cache = model(ids, use_cache=True).past_key_values
        expected = model(ids[:, :1], past_key_values=cache.clone(), use_cache=True).logits
        graph, one = torch.cuda.CUDAGraph(), ids[:, :1].clone()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph):
            logits = model(one, past_key_values=cache, use_cache=True).logits
        graph.replay()
    same(logits, expected)


@on_a_gpu
def test_on_a_gpu_a_state_in_a_graph_is_not_captured_by_somebody_else():
    model, ids = make(PLAIN).to(HERE), text(2, 9).to(HERE)
    cache = read(model, ids, cache=RwkvStaticCache())[1]
    with torch.no_grad(), pytest.raises(RuntimeError, match="clone"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        model(ids[:, :1], past_key_values=cache, use_cache=True)


@on_a_gpu
def test_on_a_gpu_what_cannot_be_captured_runs_where_it_ran_before():
    class Waiting(nn.Linear):
        def forward(self, x):
            return super().forward(x) * (1 + 0 * x.sum().item())

    model, ids, stream = make(PLAIN).to(HERE), text(2, 9).to(HERE), torch.cuda.current_stream()
    head = Waiting(PLAIN["hidden_size"], PLAIN["vocab_size"], bias=False, device=HERE)
    head.weight = model.head.weight
    model.set_output_embeddings(head)
    logits, _ = read(model, ids, cache=RwkvStaticCache())
    assert torch.cuda.current_stream() == stream
    agree(logits, read(model, ids, native=False)[0], atol=1e-4)
    assert torch.rand(3, device=HERE).isfinite().all()
