"""Laws of TRL's trainers on this model: each takes the step that separate rows, computed by hand, would take."""

import copy
import math

import pytest
import torch
from datasets import Dataset
from models import agree, make, same
from peft import LoraConfig, get_peft_model
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from rwkv_finetune.tokenizer import train_tokenizer

PAIRS = [
    ("the cat", " sat under the moon and slept"),
    ("a dog ran", " home"),
    ("the sun", " rose over the sea. the cat woke"),
    ("one day", " a king lost his crown"),
]
RATE = 0.05
SIZES = {"hidden_size": 20, "num_hidden_layers": 2}
ADAPTERS = LoraConfig(
    r=3,
    target_modules=["key", "value", "receptance", "output"],
    init_lora_weights=False,  # by default adapters begin as zero, which could hide a mistake
    task_type="CAUSAL_LM",
)


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([prompt + completion for prompt, completion in PAIRS], 300)


@pytest.fixture
def model(tokenizer):
    return make(dict(SIZES, vocab_size=len(tokenizer)))


def settings(folder, **options):
    """Of one step of plain gradient descent over all rows."""
    defaults = {
        "output_dir": str(folder),
        "per_device_train_batch_size": len(PAIRS),
        "max_steps": 1,
        "optim": "sgd",
        "learning_rate": RATE,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": 1,
        "disable_tqdm": True,
    }
    return defaults | options


def row(tokenizer, prompt, completion, answer_only=True):
    """Ids (1, n) and labels (1, n) of a text alone, and its end of text."""
    begin, end = (tokenizer(text)["input_ids"] for text in (prompt, completion))
    ids = [*begin, *end, tokenizer.eos_token_id]
    unscored = len(begin) if answer_only else 1
    return torch.tensor([ids]), torch.tensor([[-100] * unscored + ids[unscored:]])


def descend(model, loss):
    """A step along the gradient of ``loss``."""
    loss.backward()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    torch.optim.SGD(trained, lr=RATE).step()


def loss_of(model, rows):
    """The mean over all labels of rows that the model reads one by one."""
    items = sum(int((labels[:, 1:] != -100).sum()) for _, labels in rows)
    return sum(model(input_ids=ids, labels=labels, num_items_in_batch=items).loss for ids, labels in rows)


def parameters(model):
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def adapted_like(trainer, base):
    """``base`` with the adapters that the trainer made, as it made them."""
    model = get_peft_model(base, ADAPTERS)
    model.load_state_dict(trainer.model.state_dict())
    return model


def took_the_step_of(trainer, expected, loss):
    """Training gives what ``loss`` gives ``expected``: the figure logged, and every parameter."""
    before = copy.deepcopy(parameters(expected))
    descend(expected, loss)
    trainer.train()
    (logged,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(loss.item(), rel=1e-4)
    agree(parameters(trainer.model), parameters(expected), rtol=1e-4, atol=1e-6)
    assert any((before[name] - parameter).abs().max() > 1e-3 for name, parameter in parameters(expected).items())


# SFT

BATCHES = {
    "padded": {},
    "padding-free": {"padding_free": True, "max_length": None},
    "packed": {"packing": True, "max_length": 40},
    "in two parts": {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
}


def sft(model, tokenizer, folder, answers_only=True, adapters=None, **options):
    columns = {"prompt": [p for p, _ in PAIRS], "completion": [c for _, c in PAIRS]}
    return SFTTrainer(
        model=model,
        args=SFTConfig(**settings(folder, **options)),
        train_dataset=Dataset.from_dict(columns if answers_only else {"text": [p + c for p, c in PAIRS]}),
        processing_class=tokenizer,
        peft_config=adapters,
    )


@pytest.mark.parametrize("answers_only", [False, True])
@pytest.mark.parametrize("batch", BATCHES)
def test_sft_takes_the_step_of_separate_rows(batch, answers_only, model, tokenizer, tmp_path):
    expected = copy.deepcopy(model)
    trainer = sft(model, tokenizer, tmp_path, answers_only, **BATCHES[batch])
    rows = [row(tokenizer, *pair, answers_only) for pair in PAIRS]
    took_the_step_of(trainer, expected, loss_of(expected, rows))


@pytest.mark.parametrize("batch", ["padded", "padding-free"])
def test_sft_trains_adapters(batch, model, tokenizer, tmp_path):
    base = copy.deepcopy(model)
    trainer = sft(model, tokenizer, tmp_path, adapters=ADAPTERS, **BATCHES[batch])
    expected = adapted_like(trainer, base)
    took_the_step_of(trainer, expected, loss_of(expected, [row(tokenizer, *pair) for pair in PAIRS]))


def test_sft_learns_and_its_result_generates(model, tokenizer, tmp_path):
    """With evaluation, and everything that TRL does by default but bfloat16."""
    options = {"optim": "adamw_torch", "max_steps": 20, "learning_rate": 0.02, "save_strategy": "steps"}
    trainer = sft(model, tokenizer, tmp_path, **options)
    before = trainer.evaluate(trainer.train_dataset)["eval_loss"]
    trainer.train()
    assert trainer.evaluate(trainer.train_dataset)["eval_loss"] < 0.5 * before
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-20")
    ids = tokenizer("the cat", return_tensors="pt")["input_ids"]
    same(saved.generate(ids, max_new_tokens=5), model.eval().generate(ids, max_new_tokens=5))


# DPO


def dpo(model, tokenizer, folder, **arguments):
    chosen, rejected = [c for _, c in PAIRS], [c for _, c in PAIRS[1:] + PAIRS[:1]]
    columns = {"prompt": [p for p, _ in PAIRS], "chosen": chosen, "rejected": rejected}
    return DPOTrainer(
        model=model,
        args=DPOConfig(beta=0.3, **settings(folder)),
        train_dataset=Dataset.from_dict(columns),
        processing_class=tokenizer,
        **arguments,
    )


def dpo_loss(policy, reference, tokenizer):
    """-log sigmoid(beta (log ratio of the chosen - log ratio of the rejected)), the mean over pairs."""

    def likelihood(prompt, completion):
        ids, labels = row(tokenizer, prompt, completion)
        with torch.no_grad():
            there = log_likelihood(reference, ids, labels)
        return log_likelihood(policy, ids, labels) - there

    margins = [
        likelihood(prompt, chosen) - likelihood(prompt, rejected)
        for (prompt, chosen), (_, rejected) in zip(PAIRS, PAIRS[1:] + PAIRS[:1], strict=True)
    ]
    return -logsigmoid(0.3 * torch.stack(margins)).mean()


def log_likelihood(model, ids, labels):
    predicted = model(input_ids=ids).logits[0, :-1].log_softmax(-1)
    scored = labels[0, 1:] != -100
    return predicted.gather(-1, ids[0, 1:, None])[:, 0][scored].sum()


def test_dpo_takes_the_step_of_separate_rows(model, tokenizer, tmp_path):
    reference = make(dict(SIZES, vocab_size=len(tokenizer)), seed=1)
    expected = copy.deepcopy(model)
    loss = dpo_loss(expected, copy.deepcopy(reference), tokenizer)
    assert abs(loss - math.log(2)) > 0.1  # what it is where policy and reference are the same
    took_the_step_of(dpo(model, tokenizer, tmp_path, ref_model=reference), expected, loss)


def test_dpo_trains_adapters_against_their_base(model, tokenizer, tmp_path):
    base = copy.deepcopy(model)
    trainer = dpo(model, tokenizer, tmp_path, peft_config=ADAPTERS)
    expected = adapted_like(trainer, copy.deepcopy(base))
    loss = dpo_loss(expected, base, tokenizer)
    assert abs(loss - math.log(2)) > 1e-3
    took_the_step_of(trainer, expected, loss)
