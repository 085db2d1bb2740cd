"""Laws of failed conversions: nothing is left behind, no code runs, and the error names the cause."""

import errno
import os
import pickle
import random
import resource
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_cases import (
    SMALL,
    Shape,
    blink_state,
    make_tokenizer,
    save,
)

from modeling_rwkv import checkpoints
from modeling_rwkv.checkpoints import CheckpointError, convert


@pytest.fixture
def alone(tmp_path: Path) -> Iterator[Path]:
    """A folder in which a failed conversion must leave nothing behind, hidden files included."""
    folder = tmp_path / "alone"
    folder.mkdir()
    yield folder
    assert list(folder.iterdir()) == []


# -- what is in the file ---------------------------------------------------------------------------

Change = Callable[[dict[str, Any]], Any]


def without(name: str) -> Change:
    return lambda state: {key: value for key, value in state.items() if key != name}


def plus(name: str, value: Any) -> Change:
    return lambda state: state | {name: value}


REFUSED: dict[str, tuple[Change, str]] = {
    "missing": (without("blocks.1.att.key.weight"), r"no tensor blocks\.1\.att\.key\.weight"),
    "missing-head": (without("head.weight"), r"no tensor head\.weight"),
    "missing-ln0": (without("blocks.0.ln0.bias"), r"no tensor blocks\.0\.ln0\.bias"),
    "gap": (plus("blocks.7.ln1.weight", torch.ones(4)), r"no tensor blocks\.2\."),
    "unknown": (plus("blocks.0.att.extra", torch.ones(4)), r"blocks\.0\.att\.extra"),
    "ln0-in-block-1": (plus("blocks.1.ln0.weight", torch.ones(4)), r"blocks\.1\.ln0\.weight"),
    "empty": (lambda state: {}, "no tensor emb.weight"),
    "shape": (plus("head.weight", torch.ones(11, 5)), r"head\.weight .*\(11, 5\).*\(11, 4\)"),
    "transposed": (plus("blocks.1.ffn.key.weight", torch.ones(4, 8)), r"\(4, 8\).*\(8, 4\)"),
    "flat-mix": (plus("blocks.0.att.time_mix_k", torch.ones(4)), r"\(4,\).*\(1, 1, 4\)"),
    "zero": (plus("emb.weight", torch.ones(0, 4)), r"emb\.weight .*\(0, 4\)"),
    "int8": (plus("head.weight", torch.ones(11, 4, dtype=torch.int8)), r"head\.weight .*int8"),
    "number": (plus("head.weight", 3), r"head\.weight .*int"),
    "v5": (plus("blocks.0.att.ln_x.weight", torch.ones(4)), "RWKV-5"),
    "v5-decay": (plus("blocks.0.att.time_decay", torch.ones(2, 3)), "RWKV-5"),
    "v6": (
        lambda state: (
            state | {"blocks.0.att.ln_x.bias": torch.ones(4), "blocks.0.att.time_maa_x": torch.ones(1, 1, 4)}
        ),
        "RWKV-6",
    ),
    "v7-x_r": (plus("blocks.0.att.x_r", torch.ones(1, 1, 4)), "RWKV-7"),
    "v7-r_k": (
        lambda state: state | {"blocks.0.att.ln_x.bias": torch.ones(4), "blocks.0.att.r_k": torch.ones(2, 2)},
        "RWKV-7",
    ),
    "chat-strategy": (plus("_strategy", "cpu fp32"), "ChatRWKV.*_strategy"),
    "chat-version": (plus("_version", "0.7"), "ChatRWKV.*_version"),
    "chat-rescale": (plus("_rescale_layer", 6), "ChatRWKV.*_rescale_layer"),
    "trainer-model": (lambda state: {"model": state, "step": 3}, "'model'"),
    "trainer-state": (lambda state: {"state_dict": state, "epoch": 1}, "'state_dict'"),
    "deepspeed": (lambda state: {"module": state}, "'module'"),
    "list": (lambda state: list(state.values()), "list"),
    "tensor": (lambda state: state["emb.weight"], "Tensor"),
    "numbered": (lambda state: dict(enumerate(state.values())), "named"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_content_is_refused(tmp_path: Path, alone: Path, case: str) -> None:
    change, words = REFUSED[case]
    source = save(tmp_path / "a.pth", change(blink_state()))
    with pytest.raises(CheckpointError, match=words) as error:
        convert(source, alone / "out", progress=False)
    assert "\n" not in str(error.value)
    assert ";" in str(error.value), "no cure"


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize("part", [0.0, 0.001, 0.1, 0.5, 0.99, 0.9999])
def test_truncated_file_is_refused(tmp_path: Path, alone: Path, part: float, legacy: bool) -> None:
    source = save(tmp_path / "a.pth", None, _use_new_zipfile_serialization=not legacy)
    raw = source.read_bytes()
    source.write_bytes(raw[: int(len(raw) * part)])
    with pytest.raises(CheckpointError, match="empty" if part == 0 else "truncated"):
        convert(source, alone / "out", progress=False)


@pytest.mark.parametrize("content", [b"hello world", b"\x80\x04", b"PK\x05\x06" + 18 * b"\0", b"{}"])
def test_other_files_are_refused(tmp_path: Path, alone: Path, content: bytes) -> None:
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(CheckpointError, match="not a PyTorch checkpoint"):
        convert(tmp_path / "a.pth", alone / "out", progress=False)


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_damage_is_never_more_than_a_checkpoint_error(tmp_path: Path, legacy: bool) -> None:
    source = save(tmp_path / "a.pth", None, _use_new_zipfile_serialization=not legacy)
    raw = source.read_bytes()
    rng = random.Random(0)
    refused = 0
    for attempt in range(150):
        damaged = bytearray(raw)
        for _ in range(rng.choice((1, 5, 30))):
            damaged[rng.randrange(len(raw))] = rng.randrange(256)
        source.write_bytes(damaged)
        try:
            convert(source, tmp_path / f"out{attempt}", progress=False)
        except CheckpointError:
            refused += 1
            assert not (tmp_path / f"out{attempt}").exists()
    assert refused > 10


class Evil:
    """Unpickling this makes a folder."""

    def __init__(self, trace: Path) -> None:
        self.trace = trace

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.trace),)


@pytest.mark.parametrize("form", ["zip", "legacy", "plain"])
def test_code_in_a_pickle_does_not_run(tmp_path: Path, alone: Path, form: str) -> None:
    source, trace = tmp_path / "a.pth", tmp_path / "trace"
    evil = blink_state() | {"evil": Evil(trace)}
    if form == "plain":
        source.write_bytes(pickle.dumps(evil["evil"], protocol=2))
    else:
        save(source, evil, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(CheckpointError, match=r"run code \(\w+\.mkdir\)"):
        convert(source, alone / "out", progress=False)
    assert not trace.exists()
    torch.load(source, weights_only=False) if form != "plain" else pickle.loads(source.read_bytes())
    assert trace.exists(), "the pickle was harmless, so this test proves nothing"


def test_code_in_a_folder_does_not_run(tmp_path: Path, alone: Path) -> None:
    folder, trace = tmp_path / "model", tmp_path / "trace"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "rwkv"}')
    torch.save({"evil": Evil(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(CheckpointError, match="run code"):
        convert(folder, alone / "b.pth", progress=False)
    assert not trace.exists()


FOLDER_REFUSED: dict[str, tuple[Callable[[Path], Any], str]] = {
    "other-type": (
        lambda folder: (folder / "config.json").write_text('{"model_type": "rwkv5"}'),
        "rwkv5",
    ),
    "no-type": (lambda folder: (folder / "config.json").write_text("{}"), "None"),
    "no-config": (lambda folder: (folder / "config.json").unlink(), r"config\.json"),
    "bad-config": (lambda folder: (folder / "config.json").write_text("{"), r"config\.json"),
    "list-config": (lambda folder: (folder / "config.json").write_text("[]"), "list"),
    "no-weights": (
        lambda folder: (folder / "model.safetensors.index.json").unlink(),
        r"neither model\.safetensors",
    ),
    "no-map": (
        lambda folder: (folder / "model.safetensors.index.json").write_text("{}"),
        "weight_map",
    ),
    "no-shard": (
        lambda folder: next(folder.glob("model-00002*")).unlink(),
        r"model-00002-of-\d+\.safetensors is missing",
    ),
    "short-shard": (
        lambda folder: os.truncate(next(folder.glob("model-00002*")), 90),
        r"model-00002-of-\d+\.safetensors .*truncated",
    ),
    "empty-shard": (
        lambda folder: next(folder.glob("model-00002*")).write_bytes(b""),
        r"model-00002-of-\d+\.safetensors .*truncated",
    ),
    "wrong-shard": (
        lambda folder: shutil.copy(next(folder.glob("model-00001*")), next(folder.glob("model-00002*"))),
        r"no tensor rwkv\.",
    ),
}


@pytest.mark.parametrize("case", FOLDER_REFUSED)
def test_folder_is_refused(tmp_path: Path, alone: Path, case: str) -> None:
    change, words = FOLDER_REFUSED[case]
    folder = tmp_path / "model"
    convert(save(tmp_path / "a.pth"), folder, max_shard_size=400, progress=False)
    change(folder)
    with pytest.raises(CheckpointError, match=words) as error:
        convert(folder, alone / "b.pth", progress=False)
    assert ";" in str(error.value), "no cure"


# -- where it comes from and where it goes ---------------------------------------------------------


@pytest.fixture(params=["to-folder", "to-pth"])
def pair(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, str]:
    """A source, and a name for its destination: once in each direction."""
    source = save(tmp_path / "a.pth")
    if request.param == "to-folder":
        return source, "out"
    convert(source, tmp_path / "model", progress=False)
    return tmp_path / "model", "b.pth"


def test_missing_source_is_refused(tmp_path: Path, alone: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no\.pth does not exist"):
        convert(tmp_path / "no.pth", alone / "out", progress=False)


def test_existing_destination_is_left_alone(tmp_path: Path, pair: tuple[Path, str]) -> None:
    source, name = pair
    (tmp_path / name).mkdir()
    if source.is_dir():  # not even an empty folder can become a file
        with pytest.raises(CheckpointError, match=f"{name} exists already"):
            convert(source, tmp_path / name, progress=False)
    (tmp_path / name / "precious").write_text("data")
    with pytest.raises(CheckpointError, match=f"{name} exists already"):
        convert(source, tmp_path / name, progress=False)
    assert (tmp_path / name / "precious").read_text() == "data"
    shutil.rmtree(tmp_path / name)
    (tmp_path / name).write_text("data")
    with pytest.raises(CheckpointError, match=f"{name} exists already"):
        convert(source, tmp_path / name, progress=False)
    assert (tmp_path / name).read_text() == "data"


def test_empty_folder_is_filled(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(save(tmp_path / "a.pth"), tmp_path / "out", progress=False)
    assert (tmp_path / "out/model.safetensors").exists()


def test_mount_point_is_refused(tmp_path: Path, pair: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, name = pair
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == name)
    with pytest.raises(CheckpointError, match="mount point"):
        convert(source, tmp_path / name, progress=False)


def test_written_files_are_as_readable_as_any_other(tmp_path: Path) -> None:
    report = convert(save(tmp_path / "a.pth"), tmp_path / "out", progress=False)
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode
    assert report.files[0].stat().st_mode == (tmp_path / "a.pth").stat().st_mode


def test_confused_names_are_refused(tmp_path: Path, alone: Path) -> None:
    source = save(tmp_path / "a.pth")
    report = convert(source, tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match=r"b\.pth"):
        convert(source, alone / "b.pth", progress=False)
    with pytest.raises(CheckpointError, match=r"must end in \.pth"):
        convert(tmp_path / "out", alone / "again", progress=False)
    with pytest.raises(CheckpointError, match="give the folder"):
        convert(report.files[0], alone / "again", progress=False)


def test_bad_settings_are_refused(alone: Path, pair: tuple[Path, str]) -> None:
    source, name = pair
    with pytest.raises(CheckpointError, match="'int8'"):
        convert(source, alone / name, dtype="int8", progress=False)
    if source.is_file():
        with pytest.raises(CheckpointError, match="'big'"):
            convert(source, alone / name, max_shard_size="big", progress=False)


def test_missing_parent_is_refused(tmp_path: Path, pair: tuple[Path, str]) -> None:
    source, name = pair
    with pytest.raises(CheckpointError, match=r"mkdir -p .*nowhere"):
        convert(source, tmp_path / "nowhere" / name, progress=False)
    assert not (tmp_path / "nowhere").exists()


def test_unwritable_parent_is_refused(alone: Path, pair: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    source, name = pair
    monkeypatch.setattr(Path, "mkdir", refuse)  # root may write anywhere, so it is pretended
    with pytest.raises(CheckpointError, match=f"{name} cannot be written.*Permission denied"):
        convert(source, alone / name, progress=False)


def test_full_disk_is_seen_beforehand(alone: Path, pair: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, name = pair
    needed = sum(t.nbytes for t in blink_state().values())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    with pytest.raises(CheckpointError, match=f"no space left.*{needed:,} bytes"):
        convert(source, alone / name, progress=False)


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CheckpointError),
        (OSError(errno.EIO, "Input/output error"), CheckpointError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ZeroDivisionError(), ZeroDivisionError),
    ],
    ids=repr,
)
@pytest.mark.parametrize("moment", ["writing", "verifying"])
def test_crash_leaves_nothing(
    alone: Path,
    pair: tuple[Path, str],
    monkeypatch: pytest.MonkeyPatch,
    moment: str,
    error: BaseException,
    raised: type[BaseException],
) -> None:
    source, name = pair
    seen: list[Path] = []

    def crash(*args: Any) -> None:
        seen.extend(path for path in alone.rglob("*") if path.is_file())
        raise error

    if moment == "verifying":
        monkeypatch.setattr(checkpoints, "verify", crash)
    else:
        # The bar moves after each tensor.
        monkeypatch.setattr(checkpoints.tqdm, "update", crash)
    with pytest.raises(raised):
        convert(source, alone / name, progress=False)
    assert seen, "crashed before anything was written"


def test_failing_write_is_reported_as_such(tmp_path: Path, alone: Path) -> None:
    """The kernel itself stops the writing, in the middle of the weights."""
    source = save(tmp_path / "a.pth", blink_state(Shape(64, 64, 64, 256, 1)))
    convert(source, tmp_path / "model", progress=False)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        for origin, name in ((source, "out"), (tmp_path / "model", "b.pth")):
            with pytest.raises(CheckpointError, match=f"{name} cannot be written.*File too large"):
                convert(origin, alone / name, progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_flipped_bit_is_found(alone: Path, pair: tuple[Path, str], monkeypatch: pytest.MonkeyPatch) -> None:
    source, name = pair
    saver = "save_model_folder" if source.is_file() else "save_torch_file"
    real = getattr(checkpoints, saver)

    def flip(path: Path, *args: Any) -> Any:
        result = real(path, *args)
        file = path / "model.safetensors" if path.is_dir() else path
        raw = bytearray(file.read_bytes())
        needle = blink_state()["head.weight"].numpy().tobytes()
        raw[raw.index(needle)] ^= 1
        file.write_bytes(raw)
        return result

    monkeypatch.setattr(checkpoints, saver, flip)
    with pytest.raises(CheckpointError, match=r"head\.weight did not arrive"):
        convert(source, alone / name, progress=False)


def test_cast_refuses_to_overflow(tmp_path: Path, alone: Path) -> None:
    state = blink_state()
    state["blocks.0.ffn.value.weight"][0, 0] = float("nan")
    state["blocks.1.ffn.value.weight"][0, 0] = 1e5
    source = save(tmp_path / "a.pth", state)
    with pytest.raises(CheckpointError, match=r"blocks.1.feed_forward.value.weight .*float16"):
        convert(source, alone / "out", dtype="float16", progress=False)
    convert(source, tmp_path / "out", dtype="bfloat16", progress=False)


# -- the tokenizer ---------------------------------------------------------------------------------


def test_too_large_tokenizer_is_refused(tmp_path: Path, alone: Path) -> None:
    make_tokenizer(270).save(str(tmp_path / "tokenizer.json"))
    source = save(tmp_path / "a.pth", blink_state(SMALL._replace(vocab=269)))
    with pytest.raises(CheckpointError, match=r"270 .*269"):
        convert(source, alone / "out", tokenizer=tmp_path / "tokenizer.json", progress=False)


def test_bad_tokenizer_is_refused(tmp_path: Path, alone: Path) -> None:
    source = save(tmp_path / "a.pth")
    (tmp_path / "bad.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    (tmp_path / "bytes.json").write_bytes(b"\xff\x00")
    cases = {"bad.json": "not a tokenizer", "bytes.json": "not a tokenizer", "no.json": "exist", "empty": "exist"}
    for path, words in cases.items():
        with pytest.raises(CheckpointError, match=words):
            convert(source, alone / "out", tokenizer=tmp_path / path, progress=False)
    convert(source, tmp_path / "out", progress=False)
    with pytest.raises(CheckpointError, match="tokenizer"):
        convert(tmp_path / "out", alone / "b.pth", tokenizer=tmp_path / "bad.json")
