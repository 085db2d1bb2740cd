"""`rwkv doctor`: what it says of this machine, and that it finds faults."""

import json

import pytest
import torch
from commands import raiser, rwkv

import modeling_rwkv
from modeling_rwkv import doctor
from rwkv_kernels import decode_cpu, wkv4
from rwkv_kernels.loader import Unavailable


def test_doctor():
    result = rwkv("doctor")
    assert (result.exit_code, result.stderr) == (0, "")
    assert "FAIL" not in result.stdout and result.stdout.count("PASS") >= 4
    for word in (torch.__version__, "transformers", "cpu", *wkv4.BACKENDS):
        assert word in result.stdout


@pytest.fixture
def one_thread():
    """On a busy machine threads wait for each other, and time says nothing."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.usefixtures("one_thread")
def test_doctor_as_json():
    result = rwkv("doctor", "--json")
    found = json.loads(result.stdout)
    assert (result.exit_code, found["passed"]) == (0, True)
    cpu = found["devices"][0]
    for dtype in ("float32", "bfloat16", "float16", "float64"):
        assert cpu["wkv"][dtype] == wkv4.choose_backend(torch.empty(1, 2, 8, dtype=getattr(torch, dtype)))
    assert set(cpu["wkv"].values()) | set(cpu["not_wkv"]) == set(wkv4.BACKENDS)
    assert found["versions"]["torch"] == torch.__version__


def test_doctor_says_why_an_implementation_does_not_run(monkeypatch):
    original = wkv4.wkv4

    def operator(*args, backend="auto"):
        return (
            raiser(RuntimeError("no wires\nin this house"))()
            if backend == "abacus"
            else original(*args, backend=backend)
        )

    monkeypatch.setitem(wkv4.BACKENDS, "abacus", "beads on wires")
    monkeypatch.setattr(doctor.operator, "wkv4", operator)
    assert "beads" not in json.dumps(doctor.examine()["devices"][0]["wkv"])
    assert doctor.examine()["devices"][0]["not_wkv"]["abacus"] == "no wires"


def test_doctor_says_whether_a_token_is_computed_at_once(monkeypatch):
    assert "the next token is computed at once" in rwkv("doctor").stdout
    monkeypatch.setattr(decode_cpu, "_library", raiser(Unavailable("No C++ compiler. Install one.")))
    assert doctor.examine()["devices"][0]["not_decoding"] == "No C++ compiler. Install one."
    assert "module by module: No C++ compiler. Install one." in rwkv("doctor").stdout


def test_doctor_finds_a_token_that_is_wrong(monkeypatch):
    step = decode_cpu.Decoder.step
    monkeypatch.setattr(decode_cpu.Decoder, "step", lambda *given: -step(*given))
    result = rwkv("doctor")
    assert result.exit_code == 1 and result.stdout.count("FAIL") == 1 and "FAIL  a token" in result.stdout


def wrong(change):
    """The operator, with ``change`` made to its output and state."""
    original = wkv4.wkv4

    def operator(*args, **kwargs):
        return change(args, *original(*args, **kwargs))

    return operator


FAULTS = {
    "output": (lambda args, y, state: (y * 1.05, state), "reference"),
    "nan": (lambda args, y, state: (y * torch.nan, state), "reference"),
    "state": (lambda args, y, state: (y, torch.zeros_like(state)), "parts"),
    "shape": (lambda args, y, state: raiser(RuntimeError("broken"))(), "reference"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_doctor_finds_a_broken_operator(monkeypatch, fault):
    change, law = FAULTS[fault]
    monkeypatch.setattr(doctor.operator, "wkv4", wrong(change))
    result = rwkv("doctor")
    assert result.exit_code == 1
    failed = [line for line in result.stdout.splitlines() if "FAIL" in line]
    assert any(law in line for line in failed) and len(failed) < result.stdout.count("PASS") + len(failed)
    assert json.loads(rwkv("doctor", "--json").stdout)["passed"] is False


@pytest.mark.parametrize("value", [0.1, torch.nan])
def test_doctor_finds_a_model_that_reads_padding(monkeypatch, value):
    forward = modeling_rwkv.RwkvForCausalLM.forward

    def leaky(self, *args, attention_mask=None, **kwargs):
        output = forward(self, *args, attention_mask=attention_mask, **kwargs)
        if attention_mask is not None:
            output.logits[-1] += value
        return output

    monkeypatch.setattr(modeling_rwkv.RwkvForCausalLM, "forward", leaky)
    result = rwkv("doctor")
    assert result.exit_code == 1
    (failed,) = [line for line in result.stdout.splitlines() if "FAIL" in line]
    assert "padded" in failed
