"""Programs that never heard of this package use it for a folder that was shared, or say how to install it."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import models
import pytest
import torch
import yaml
from commands import refused, rwkv
from huggingface_hub import HfApi, ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_rwkv
from modeling_rwkv import RwkvConfig, RwkvForCausalLM, RwkvModel, RwkvTokenizer, share
from modeling_rwkv.chat_templates import CHAT_TEMPLATES

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ["The fox: 狐狸", "a", "longer than the others"]
SIZES = {"vocab_size": 257, "hidden_size": 24, "attention_hidden_size": 24, "num_hidden_layers": 2}


@pytest.fixture(name="saved", scope="module")
def saved_folder(tmp_path_factory) -> Path:
    """A model that begins with a state, its tokenizer and a chat template, as `save_pretrained` leaves them."""
    folder = tmp_path_factory.mktemp("saved") / "fox"
    vocab = folder.with_suffix(".txt")
    vocab.write_text("".join(f"{byte + 1} {bytes([byte])!r} 1\n" for byte in range(256)))
    tokenizer = RwkvTokenizer(vocab, chat_template=CHAT_TEMPLATES["world"].text)
    tokenizer.save_pretrained(folder)
    model = models.make(SIZES, context_length=777)
    with torch.no_grad():
        model.set_initial_state(model(**tokenizer("A state.", return_tensors="pt"), use_cache=True).past_key_values)
    model.generation_config.stop_strings = list(CHAT_TEMPLATES["world"].stop_strings)
    model.save_pretrained(folder)
    return folder


@pytest.fixture(name="folder")
def shared_folder(saved: Path, tmp_path: Path) -> Path:
    """The same, shared."""
    folder = tmp_path / saved.name
    folder.mkdir()
    for file in saved.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    share(folder)
    return folder


def settings(folder: Path, name: str = "config.json") -> dict:
    return json.loads((folder / name).read_text())


def process(tmp_path: Path, *command: object, hidden: bool = False) -> subprocess.CompletedProcess:
    """Run a program that does not know this package, or does not even have it."""
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    if hidden:
        (tmp_path / "hidden").mkdir()
        missing = "raise ModuleNotFoundError(\"No module named 'modeling_rwkv'\", name='modeling_rwkv')"
        (tmp_path / "hidden" / "modeling_rwkv.py").write_text(missing)
        paths.insert(0, str(tmp_path / "hidden"))
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "HF_HOME": str(tmp_path / "hub"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *map(str, command)]
    return subprocess.run(
        command, cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )


# -- other programs --------------------------------------------------------------------------------

STRANGER = """
import json, sys
import torch, transformers
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer

folder, *trust = sys.argv[1:]
options = {"trust_remote_code": True} if trust else {}
tokenizer = AutoTokenizer.from_pretrained(folder, **options)
model = AutoModelForCausalLM.from_pretrained(folder, **options)
by_name = getattr(transformers, model.config.architectures[0])  # as TRL and `transformers serve` find their class
others = [by_name.from_pretrained(folder, **options), AutoModel.from_pretrained(folder, **options)]
batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
with torch.no_grad():
    logits = model(**batch, use_cache=False).logits[batch.attention_mask.bool()]
print(json.dumps({
    "ids": tokenizer(TEXTS)["input_ids"],
    "logits": logits.tolist(),
    "rooms": sorted({type(x).__module__.split(".")[0] for x in (model, model.config, *others)}),
    "tokenizer": type(tokenizer).__name__,
}))
""".replace("TEXTS", repr(TEXTS))


@pytest.mark.parametrize("trust", [True, False])
def test_a_program_that_never_heard_of_this_package(trust, folder, tmp_path):
    done = process(tmp_path, "-c", STRANGER, folder, *["trust"] * trust)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["rooms"] == (["modeling_rwkv"] if trust else ["transformers"])
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
    assert found["ids"] == tokenizer(TEXTS).input_ids
    if trust:
        assert found["tokenizer"] == "RwkvTokenizer"
        batch = tokenizer(TEXTS, return_tensors="pt", padding=True)
        with torch.no_grad():
            models.agree(torch.tensor(found["logits"]), model(**batch).logits[batch.attention_mask.bool()])


def test_where_this_package_is_not_installed(folder, tmp_path):
    done = process(tmp_path, "-c", STRANGER, folder, "trust", hidden=True)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith("pip install modeling-rwkv")


TASK = """
task: candles
dataset_path: json
dataset_kwargs: {data_files: DATA}
test_split: train
output_type: multiple_choice
doc_to_text: "{{goal}}"
doc_to_target: label
doc_to_choice: "{{[sol1, sol2]}}"
"""


def test_the_harness_uses_it(folder, tmp_path):
    """`lm_eval --model hf`: the likelihoods of its answers are those of this model, with its state and its padding."""
    (tmp_path / "candles.yaml").write_text(TASK.replace("DATA", str(ROOT / "eval" / "sample" / "piqa.jsonl")))
    model_args = f"pretrained={folder},trust_remote_code=True,dtype=float32"
    options = ["--tasks", "candles", "--include_path", tmp_path, "--limit", 3, "--batch_size", 4, "--device", "cpu"]
    output = ["--output_path", tmp_path / "output", "--log_samples"]
    done = process(tmp_path, "-m", "lm_eval", "--model", "hf", "--model_args", model_args, *options, *output)
    assert done.returncode == 0, done.stderr
    (samples,) = (tmp_path / "output").rglob("samples_*.jsonl")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    for line in samples.read_text().splitlines():
        sample = json.loads(line)
        for asked, answered in zip(sample["arguments"].values(), sample["resps"], strict=True):
            context, whole = (tokenizer(text).input_ids for text in (asked["arg_0"], asked["arg_0"] + asked["arg_1"]))
            with torch.no_grad():
                scores = model(torch.tensor([whole])).logits[0, :-1].log_softmax(-1)
            expected = scores.gather(-1, torch.tensor(whole[1:])[:, None])[len(context) - 1 :].sum()
            models.agree(torch.tensor(float(answered[0][0])), expected, atol=1e-3)


def test_trl_trains_it(folder, tmp_path):
    """TRL's own program; what it saves is shared as well, and ours."""
    row = {"messages": [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "A fox."}]}
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text(f"{json.dumps(row)}\n" * 2)
    model = ["--model_name_or_path", folder, "--trust_remote_code", "--assistant_only_loss", "--use_cpu"]
    options = ["--max_steps", 1, "--report_to", "none", "--bf16", "false", "--output_dir", tmp_path / "run"]
    done = process(tmp_path, "-m", "trl.scripts.sft", "--dataset_name", tmp_path / "data", *model, *options)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "use_modeling_rwkv.py").exists()
    before, after = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, tmp_path / "run"))
    assert after.config.initial_state and after.config.auto_map == before.config.auto_map
    assert not torch.equal(before.head.weight, after.head.weight)
    tensors = [load_file(path / "model.safetensors").keys() for path in (folder, tmp_path / "run")]
    assert tensors[0] == tensors[1]  # the state, which the model inside transformers would leave out, is there


# -- saving ----------------------------------------------------------------------------------------


def test_what_is_loaded_from_a_shared_folder_is_saved_so(folder, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    for copy in ("model", "tokenizer"):
        assert (tmp_path / copy / "use_modeling_rwkv.py").read_text() == (folder / "use_modeling_rwkv.py").read_text()
    assert settings(tmp_path / "model") == settings(folder)
    name = "tokenizer_config.json"
    assert settings(tmp_path / "tokenizer", name)["auto_map"] == settings(folder, name)["auto_map"]
    assert settings(tmp_path / "model")["initial_state"] is True


def test_what_comes_from_the_hub_is_saved_with_a_file_of_its_own(folder, tmp_path):
    config = RwkvConfig.from_pretrained(folder)
    wanted = config.auto_map
    config.auto_map = {name: f"someone/fox--{place}" for name, place in wanted.items()}
    config.save_pretrained(tmp_path / "again")
    assert settings(tmp_path / "again")["auto_map"] == wanted
    assert (tmp_path / "again" / "use_modeling_rwkv.py").exists()


def test_nothing_is_added_unasked(saved):
    assert not (saved / "use_modeling_rwkv.py").exists() and not (saved / "README.md").exists()
    assert "auto_map" not in settings(saved) and "auto_map" not in settings(saved, "tokenizer_config.json")


@pytest.mark.parametrize("registered", [RwkvConfig, RwkvModel, RwkvForCausalLM, RwkvTokenizer])
def test_the_way_of_transformers(registered, saved, folder, tmp_path, monkeypatch):
    """`register_for_auto_class` shares what is saved, or pushed, from then on."""
    for cls in (RwkvConfig, RwkvTokenizer):
        monkeypatch.setattr(cls, "_registered", False)
    registered.register_for_auto_class()
    model = AutoTokenizer if registered is RwkvTokenizer else AutoModelForCausalLM
    model.from_pretrained(saved).save_pretrained(tmp_path / "out")
    assert (tmp_path / "out" / "use_modeling_rwkv.py").exists()
    assert not list((tmp_path / "out").glob("[mct]*_rwkv.py"))  # the sources of this package stay at home
    name = "tokenizer_config.json" if registered is RwkvTokenizer else "config.json"
    assert settings(tmp_path / "out", name)["auto_map"] == settings(folder, name)["auto_map"]


def test_only_what_is_needed_is_changed(saved, folder):
    for name in ("config.json", "tokenizer_config.json"):
        before, after = settings(saved, name), settings(folder, name)
        assert after == before | {key: after[key] for key in ("architectures", "auto_map") if key in after}
    for file in saved.iterdir():
        if file.name not in ("config.json", "tokenizer_config.json"):
            assert (folder / file.name).read_bytes() == file.read_bytes()


def test_an_auto_map_of_a_person_keeps_its_other_classes(saved, folder, tmp_path):
    copy = Path(shutil.copytree(saved, tmp_path / "copy"))
    own = {"AutoConfig": "mine.Config", "AutoModelForSequenceClassification": "mine.Classifier"}
    for name in ("config.json", "tokenizer_config.json"):
        (copy / name).write_text(json.dumps(settings(copy, name) | {"auto_map": own}))
    share(copy)
    for name in ("config.json", "tokenizer_config.json"):
        assert settings(copy, name)["auto_map"] == own | settings(folder, name)["auto_map"]


def test_links_are_replaced_and_what_they_lead_to_stays(saved, tmp_path):
    """As in the Hub's cache, whose files are links to content that other revisions share."""
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    (tmp_path / "blobs").mkdir()
    for name in ("config.json", "tokenizer_config.json", "use_modeling_rwkv.py", "README.md"):
        blob = tmp_path / "blobs" / name
        blob.write_bytes((folder / name).read_bytes() if (folder / name).exists() else b"old")
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(blob)
    before = {blob.name: blob.read_bytes() for blob in (tmp_path / "blobs").iterdir()}
    share(folder)
    assert {blob.name: blob.read_bytes() for blob in (tmp_path / "blobs").iterdir()} == before
    assert settings(folder)["auto_map"] and not any(file.is_symlink() for file in folder.iterdir())


@pytest.mark.parametrize("kind", ["config", "tokenizer", "model"])
def test_what_is_pushed_to_the_hub_has_the_file_that_it_names(kind, folder, tmp_path, monkeypatch):
    """The first time, and again where everything is there already."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    uploads = []
    monkeypatch.setattr(HfApi, "create_repo", lambda *args, **kwargs: SimpleNamespace(repo_id="me/fox"))
    monkeypatch.setattr(HfApi, "create_commit", lambda self, operations, **kwargs: uploads.append(operations))
    saver = {"config": model.config, "tokenizer": tokenizer, "model": model}[kind]
    for _ in range(2):
        saver.save_pretrained(str(tmp_path / "out"), push_to_hub=True, repo_id="me/fox")
    for operations in uploads:
        assert "use_modeling_rwkv.py" in {operation.path_in_repo for operation in operations}
    assert len(uploads) == 2


# -- the card --------------------------------------------------------------------------------------


def test_a_card_says_what_the_files_say(folder):
    text = (folder / "README.md").read_text()
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert f"{model.num_parameters():,}" in text and "| hidden size | 24 |" in text and "| 777 |" in text
    assert "a learned state" in text and "trust_remote_code=True" in text and "pip install modeling-rwkv" in text
    assert "\nUser: What does the fox eat?\n\nAssistant: Red berries, every day.\n\n" in text
    data = ModelCard(text).data
    assert (data.library_name, data.pipeline_tag, data.license) == ("transformers", "text-generation", None)


def test_a_second_time_changes_nothing(folder):
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    share(folder)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


HEADS = {
    "none": "",
    "a comment and a word that YAML reads otherwise": "---\n# ours\nlicense: mit  # yes\nlanguage: [no]\n---\n",
    "results": "---\nmodel-index:\n- name: fox\n  results: [{metrics: [{type: acc, value: 3.40, seed: 1}]}]\n---\n",
    "fields of its own": "---\npipeline_tag: summarization\ntags:\n- fox\nlibrary_name:\n---\n",
    "an odd field": "---\n3: x\nignore_metadata_errors: 1\n---\n",
    "a block of text at the end": "---\ndescription: |-\n  a\n  b\n---\n",
}


@pytest.mark.parametrize("end", ["\n", "\r\n"])
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS)
def test_the_card_of_a_person_is_completed(head, end, folder):
    """By lines; not a byte of it changes, and what it has is not added."""
    card = f"{head}# My fox\n\n  Trained with care: \U0001f98a. \n---\n".replace("\n", end).encode()
    (folder / "README.md").write_bytes(card)
    share(folder)
    completed = (folder / "README.md").read_bytes()
    cut = len(head[: -len("---\n")].rstrip().replace("\n", end).encode())
    assert completed.startswith(card[:cut]) and completed.endswith(card[cut:])
    before, after = (
        yaml.safe_load(found[2]) if (found := REGEX_YAML_BLOCK.search(text.decode())) else {}
        for text in (card, completed)
    )
    assert after == {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": ["rwkv"]} | before


@pytest.mark.parametrize(
    "card",
    [b"---\n[\n---\ntext", b"---\n- a\n---\ntext", b"---\n{license: mit}\n---\ntext", "# Füchse".encode("latin-1")],
)
def test_a_card_that_cannot_be_read(card, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    (folder / "README.md").write_bytes(card)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    refused(rwkv("share", folder), folder / "README.md", "not UTF-8", "not YAML", "mend it")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize("stop_strings", ["\n\n", ["\n\n", "User:"]])
def test_a_card_names_each_stop_string(stop_strings, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "copy"))
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"stop_strings": stop_strings}))
    share(folder)
    expected = "`'\\n\\n'`" if isinstance(stop_strings, str) else "`'\\n\\n'` and `'User:'`"
    assert f"Generation stops at {expected}." in (folder / "README.md").read_text()


def test_a_template_of_others(saved, tmp_path):
    """It might refuse our example."""
    tokenizer = AutoTokenizer.from_pretrained(saved)
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    tokenizer.save_pretrained(tmp_path)
    RwkvConfig.from_pretrained(saved).save_pretrained(tmp_path)
    share(tmp_path)
    assert "there is a chat template" in (tmp_path / "README.md").read_text()


def test_a_model_of_a_pile_tokenizer(tmp_path):
    """The model in the box: it has no chat template, and its tokenizer needs nothing."""
    for file in modeling_rwkv.demo_model_path().glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    result = rwkv("share", tmp_path)
    assert result.exit_code == 0 and str(tmp_path / "README.md") in result.stdout
    assert "auto_map" in settings(tmp_path) and "auto_map" not in settings(tmp_path, "tokenizer_config.json")
    assert "## Chat" not in (tmp_path / "README.md").read_text()


@pytest.mark.parametrize("content", [None, "{", "[]", '{"model_type": "gpt2"}', "{}"])
def test_what_is_no_model_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    before = list(tmp_path.iterdir())
    refused(rwkv("share", tmp_path), tmp_path, "give the folder" if content != "[]" else "get the file")
    assert list(tmp_path.iterdir()) == before
