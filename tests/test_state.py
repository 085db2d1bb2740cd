"""Laws of state tuning: nothing but the state is trained, and what comes out goes wherever a model goes."""

import json
import random
from pathlib import Path

import pytest
import torch
from finetuning import WORDS, own_cache, save_model, save_rows  # noqa: F401 - a fixture of every test
from models import agree, same
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline
from typer.testing import CliRunner

from modeling_rwkv import RwkvCache, cli
from rwkv_finetune import state


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return save_model(tmp_path_factory.mktemp("base") / "tiny", attention_hidden_size=24)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    rng = random.Random(0)
    rows = [{"prompt": a, "completion": f" {b}"} for a, b in (rng.sample(WORDS.split(), 2) for _ in range(40))]
    return save_rows(tmp_path_factory.mktemp("data") / "train.jsonl", rows)


def run(base: Path, data: Path, output_dir: Path, *more: str) -> Path:
    words = (
        f"--model={base} --train_file={data} --output_dir={output_dir} --validation_share=0.2 --context_length=32 "
        "--per_device_train_batch_size=4 --max_steps=8 --save_steps=4 --eval_steps=4 --save_strategy=steps "
        "--eval_strategy=steps --logging_steps=1 --report_to=none --disable_tqdm=true"
    )
    state.main([*words.split(), *more])
    return output_dir / "state" / "state.safetensors"


@pytest.fixture(scope="module")
def tuned(base, data, tmp_path_factory) -> Path:
    return run(base, data, tmp_path_factory.mktemp("tuned") / "run")


def loss(model, base: Path, data: Path) -> float:
    """Of all answers, from the rows of the file, one at a time."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    losses = []
    for row in map(json.loads, data.read_text().splitlines()):
        prompt, answer = (tokenizer(row[part]).input_ids for part in ("prompt", "completion"))
        ids = torch.tensor([[*prompt, *answer]])
        labels = torch.tensor([[-100] * len(prompt) + answer])
        losses.append(model(ids, labels=labels).loss.item())
    return sum(losses) / len(losses)


def test_it_lowers_the_loss_with_a_small_part_of_the_parameters(base, data, tuned):
    model = AutoModelForCausalLM.from_pretrained(base)
    plain, count = loss(model, base, data), model.num_parameters()
    model.set_initial_state(tuned)
    assert loss(model, base, data) < 0.95 * plain
    assert model.num_parameters() - count == 2 * 2 * (20 + 24)
    card = (tuned.parent / "README.md").read_text()
    assert "176 trained numbers" in card and "set_initial_state" in card
    assert {path.name for path in tuned.parent.iterdir()} == {
        "state.safetensors", "tokenizer.json", "tokenizer_config.json", "README.md", "loss.png"
    }  # fmt: skip


def test_the_loss_before_is_that_of_the_model_as_it_came(base, data, tuned):
    history = json.loads((tuned.parents[1] / "trainer_state.json").read_text())["log_history"]
    before = [entry["eval_loss"] for entry in history if entry["step"] == 0]
    plain = state.build(state.StateArguments(str(base)), _arguments(tuned.parent))
    own = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(2, 30)[None]
    same(plain(ids).logits, own(ids).logits)
    state.begin(plain)
    assert (plain(ids).logits - own(ids).logits).abs().max() > 0.01
    assert len(before) == 1 and f"| {before[0]:.4f} |" in (tuned.parent / "README.md").read_text()


def test_checkpoints_hold_the_state_alone_and_a_run_goes_on_from_them(base, data, tuned, tmp_path):
    class Stop(Exception):
        pass

    def stop(trainer, *args, **kwargs):
        original(trainer, *args, **kwargs)
        if trainer.state.global_step == 4:
            raise Stop

    with pytest.MonkeyPatch.context() as patch:
        original = state.RwkvTrainer._save_checkpoint
        patch.setattr(state.RwkvTrainer, "_save_checkpoint", stop)
        with pytest.raises(Stop):
            run(base, data, tmp_path / "run")
    checkpoint = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    assert checkpoint.stat().st_size < 5000 < (base / "model.safetensors").stat().st_size / 10
    again = run(base, data, tmp_path / "run")
    one, other = load_file(again), load_file(tuned)
    assert one.keys() == other.keys() and all(torch.equal(x, other[name]) for name, x in one.items())


def test_everything_that_generates_accepts_it(base, tuned, monkeypatch):
    """As a part of the model, as a cache, and on the command line."""
    tokenizer = AutoTokenizer.from_pretrained(base)
    model = AutoModelForCausalLM.from_pretrained(base)
    ids = tokenizer("the cat", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=8, do_sample=False)
    cache = RwkvCache.load(tuned)
    expected = model.generate(ids, max_new_tokens=8, do_sample=False, past_key_values=cache)
    assert expected.tolist() != plain.tolist()
    expected = tokenizer.decode(expected[0], skip_special_tokens=True)
    generate = pipeline("text-generation", model=str(base))
    generate.model.set_initial_state(tuned)
    for _ in range(2):  # the state is not used up
        text = generate("the cat", max_new_tokens=8, do_sample=False)[0]["generated_text"]
        assert text == expected
    words = ["generate", "the cat", "--model", str(base), "--temperature", "0", "--max-new-tokens", "8"]
    result = CliRunner().invoke(cli.app, [*words, "--state", str(tuned)])
    assert result.exit_code == 0 and result.stdout.strip() == expected.strip()


def test_it_is_refused_by_another_model_of_these_sizes(base, data, tuned, tmp_path, capsys):
    other = save_model(tmp_path / "other", seed=1, attention_hidden_size=24)
    model = AutoModelForCausalLM.from_pretrained(other)
    for take in (model.set_initial_state, lambda file: RwkvCache.load(file, model=model)):
        with pytest.raises(ValueError, match="comes from another model"):
            take(tuned)
    words = ["generate", "the cat", "--model", str(other), "--state", str(tuned)]
    assert "comes from another model" in CliRunner().invoke(cli.app, words).stderr
    with pytest.raises(SystemExit):
        run(other, data, tmp_path / "run", f"--state={tuned}")
    assert "comes from another model" in capsys.readouterr().err


def test_training_goes_on_from_a_file(base, data, tuned, tmp_path):
    model = state.build(state.StateArguments(str(base), str(tuned)), _arguments(tmp_path))
    other = AutoModelForCausalLM.from_pretrained(base)
    other.set_initial_state(tuned)
    ids = torch.arange(2, 30)[None]
    same(model.eval()(ids).logits, other(ids).logits)
    assert [name for name, x in model.named_parameters() if x.requires_grad] == [
        f"rwkv.initial_state.{name}" for name in ("time_mix", "channel_mix", "value", "weight")
    ]


def test_it_is_saved_with_its_model(base, tuned, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(base)
    model.set_initial_state(tuned)
    model.save_pretrained(tmp_path)
    ids = torch.arange(2, 30)[None]
    agree(AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits, model(ids).logits)


@pytest.mark.parametrize(
    ("file", "complaint"),
    [("none", "is not a file"), ("model.safetensors", "not a saved RwkvCache")],
)
def test_what_is_no_state_is_refused(base, data, tmp_path, capsys, file, complaint):
    with pytest.raises(SystemExit) as stop:
        run(base, data, tmp_path / "run", f"--state={base / file}")
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert stop.value.code == 2 and line.startswith("error: state: ") and complaint in line
    words = ["generate", "the cat", "--model", str(base), "--state", str(base / file)]
    result = CliRunner().invoke(cli.app, words)
    assert result.exit_code == 2 and str(base / file) in result.stderr


def _arguments(folder: Path) -> state.StateTrainingArguments:
    return state.StateTrainingArguments(output_dir=str(folder), report_to="none")
