"""Laws of training: losses, gradients, checkpointed activations, adapters and `transformers.Trainer`."""

import copy

import pytest
import torch
from models import agree, bits, gradients, make, padded, same, text
from peft import LoraConfig, PeftModel, get_peft_model
from torch.nn.functional import cross_entropy
from transformers import Trainer, TrainingArguments

from modeling_rwkv import RwkvForCausalLM

GRADIENTS = {"rtol": 1e-3, "atol": 1e-4}


def cut(labels, *places):
    labels = labels.clone()
    for row, place in places:
        labels[row, place] = -100
    return labels


# Losses


def test_the_loss_is_cross_entropy_of_the_next_token():
    model = make("wide attention")
    ids = text(2, 9, 53)
    labels = cut(ids, (0, 3), (1, 8))
    output = model(ids, labels=labels)
    rows = [(t, labels[i, t + 1], i) for i in range(2) for t in range(8) if labels[i, t + 1] >= 0]
    losses = torch.stack([-output.logits[i, t].log_softmax(-1)[label] for t, label, i in rows])
    assert len(losses) == 14
    agree(output.loss, losses.mean())
    for items in (14, 100, torch.tensor(7)):
        agree(model(ids, labels=labels, num_items_in_batch=items).loss, losses.sum() / items)


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(side):
    """Even its mean: the first token of a row, for which padding stands on the left, has nothing to predict it."""
    model = make()
    rows = [text(1, n)[0] for n in (1, 4, 9)]
    ids, mask = padded(rows, side)
    loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
    total = sum(model(row[None], labels=row[None], num_items_in_batch=1).loss for row in rows[1:])
    agree(loss, total / (3 + 8))


def test_the_loss_may_continue_a_cache():
    """With a mask over the past too: a batch padded on the left, and its loss in two parts."""
    model = make()
    rows = [text(1, n)[0] for n in (3, 7)]
    ids, mask = padded(rows)
    first = model(ids[:, :2], attention_mask=mask[:, :2])
    labels = cut(ids, (0, 2))
    for given in (mask, mask[:, 2:]):
        past = first.past_key_values
        output = model(ids[:, 2:], attention_mask=given, past_key_values=past, labels=labels[:, 2:])
        whole = model(ids, attention_mask=mask).logits[:, 2:]
        valid = mask[:, 3:] == 1
        valid &= mask[:, 2:-1] == 1
        agree(output.loss, cross_entropy(whole[:, :-1][valid], ids[:, 3:][valid]))


@pytest.mark.parametrize("shape", ["one layer", "narrow attention"])
def test_gradients_are_those_of_double_precision_differences(shape):
    """Along a random direction through all parameters at once."""
    model = make(shape, dtype=torch.float64)
    ids = text(2, 9, model.config.vocab_size)
    mask = torch.tensor([[0, 0, 1, 1, 0, 1, 1, 1, 1], [1] * 9])
    parameters = list(model.parameters())
    assert {p.dtype for p in parameters} == {torch.float64}

    def loss():
        return model(ids, attention_mask=mask).logits[mask == 1].square().mean()

    grads = torch.autograd.grad(loss(), parameters)
    generator = torch.Generator().manual_seed(1)
    steps = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in parameters]
    slope = sum((g * s).sum() for g, s in zip(grads, steps, strict=True))
    losses = []
    with torch.no_grad():
        for size in (1e-6, -2e-6):
            for p, s in zip(parameters, steps, strict=True):
                p += size * s
            losses.append(loss())
    agree((losses[0] - losses[1]) / 2e-6, slope, rtol=1e-5, atol=1e-5)


# Checkpointed activations


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("batch", ["dense", "padded", "continuing"])
def test_gradient_checkpointing_changes_nothing(reentrant, batch):
    model = make("narrow attention").train()
    ids = text(2, 12, 77)
    arguments = {}
    if batch == "padded":
        arguments["attention_mask"] = torch.tensor([[0] * 5 + [1] * 7, [1] * 12])

    def run():
        if batch == "continuing":
            past = model(ids[:, :5], use_cache=True).past_key_values
            assert past.get_seq_length() == 5 and past.layers[-1].wkv.requires_grad
            output = model(ids[:, 5:], past_key_values=past, labels=ids[:, 5:])
        else:
            output = model(ids, labels=ids, **arguments)
        output.loss.backward()
        return output.loss.detach(), gradients(model)

    expected = run()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    calls = []
    hook = model.rwkv.blocks[3].ln1.register_forward_pre_hook(lambda *_: calls.append(None))
    loss, grads = run()
    hook.remove()
    assert len(calls) == (4 if batch == "continuing" else 2)  # each block again in the backward pass
    same(loss, expected[0])
    agree(grads, expected[1])


def test_gradient_checkpointing_keeps_the_cache_of_an_evaluation():
    model = make()
    model.gradient_checkpointing_enable()
    ids = text(2, 9)
    same(model.eval()(ids).logits, make()(ids).logits)
    same(
        model.generate(ids, max_new_tokens=4, pad_token_id=0, do_sample=False),
        make().generate(ids, max_new_tokens=4, pad_token_id=0, do_sample=False),
    )


# Adapters

TARGETS = ["key", "value", "receptance", "output"]


def adapted(model, **options):
    """A model with LoRA adapters that do something."""
    torch.manual_seed(0)
    config = LoraConfig(r=3, lora_alpha=6, target_modules=TARGETS, task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    with torch.no_grad():
        for name, x in model.named_parameters():
            if "lora_" in name:
                x.normal_(std=0.1)
    return model


@torch.no_grad()
def test_adapters_compute_the_same_in_training_and_evaluation():
    model = adapted(make("narrow attention"))
    ids = text(2, 9, 77)
    training = model.train()(ids).logits
    same(model.eval()(ids).logits, training)
    same(model.train()(ids).logits, training)
    with model.disable_adapter():
        same(model(ids).logits, make("narrow attention")(ids).logits)
    assert (training - make("narrow attention")(ids).logits).abs().max() > 0.1


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_trained_and_nothing_else(checkpointing):
    model = adapted(make("narrow attention")).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": True})
        model.enable_input_require_grads()
    base = {name: x.clone() for name, x in model.named_parameters() if "lora_" not in name}
    ids = text(2, 9, 77)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    trained = {name: x.grad for name, x in model.named_parameters() if x.requires_grad}
    assert len(trained) == 7 * 7 * 2  # blocks, matrices in each, A and B
    assert all(grad is not None and grad.any() for grad in trained.values())
    torch.optim.SGD([x for x in model.parameters() if x.requires_grad], lr=0.01).step()
    assert model(input_ids=ids, labels=ids).loss < loss
    same({name: x for name, x in model.named_parameters() if name in base}, base)


@torch.no_grad()
def test_adapters_are_saved_loaded_and_merged(tmp_path):
    model = adapted(make("narrow attention")).eval()
    ids = text(2, 9, 77)
    expected = model(ids).logits
    model.save_pretrained(tmp_path / "adapter")
    same(PeftModel.from_pretrained(make("narrow attention"), tmp_path / "adapter")(ids).logits, expected)
    merged = model.merge_and_unload()
    assert isinstance(merged, RwkvForCausalLM)
    agree(merged(ids).logits, expected, rtol=1e-3, atol=1e-4)
    merged.save_pretrained(tmp_path / "merged")
    same(RwkvForCausalLM.from_pretrained(tmp_path / "merged")(ids).logits, merged(ids).logits)


# Trainer


class Texts(torch.utils.data.Dataset):
    """Texts of many lengths."""

    def __init__(self, *lengths):
        self.rows = [{"input_ids": text(1, n, seed=n)[0]} for n in lengths]

    def __len__(self):
        return len(self.rows)

    def __getitem__(self, i):
        return self.rows[i]


def collate(side):
    """Batches whose labels leave out the first token of a row, so that the Trainer counts what there is to predict."""

    def collate_rows(rows):
        ids, mask = padded([row["input_ids"] for row in rows], side)
        first = (mask.cumsum(1) == 1) & (mask == 1)
        return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill((mask == 0) | first, -100)}

    return collate_rows


def trainer(model, folder, side="right", **options):
    settings = {
        "per_device_train_batch_size": 2,
        "per_device_eval_batch_size": 2,
        "max_steps": 1,
        "learning_rate": 0.01,
        "lr_scheduler_type": "constant",
        "optim": "sgd",
        "max_grad_norm": 0,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "seed": 3,
        "disable_tqdm": True,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(str(folder), **settings | options),
        train_dataset=Texts(3, 9, 5, 7),
        eval_dataset=Texts(4, 8, 2, 6),
        data_collator=collate(side),
    )


@pytest.mark.parametrize("side", ["left", "right"])
def test_trainer_evaluates_the_loss_of_the_rows(side, tmp_path):
    model = make()
    before = bits(model)
    measured = trainer(model, tmp_path, side).evaluate()["eval_loss"]
    with torch.no_grad():
        rows = [row["input_ids"][None] for row in Texts(4, 8, 2, 6)]
        sums = [model(row, labels=row, num_items_in_batch=1).loss for row in rows]
    expected = ((sums[0] + sums[1]) / (3 + 7) + (sums[2] + sums[3]) / (1 + 5)) / 2  # its mean over batches
    assert measured == pytest.approx(expected.item(), rel=1e-4)
    assert bits(model) == before


def test_trainer_takes_the_step_of_the_rows(tmp_path):
    """Two batches accumulated: one step along the mean gradient over all tokens."""
    model, expected = make(), make()
    trainer(model, tmp_path, gradient_accumulation_steps=2).train()
    rows = [row["input_ids"][None] for row in Texts(3, 9, 5, 7)]
    items = sum(row.shape[1] - 1 for row in rows)
    sum(expected(row, labels=row, num_items_in_batch=items).loss for row in rows).backward()
    torch.optim.SGD(expected.parameters(), lr=0.01).step()
    agree(dict(model.named_parameters()), dict(expected.named_parameters()))
    assert bits(model) != bits(make())


def test_trainer_learns_to_repeat_a_text(tmp_path):
    """Everything at once: padding, checkpointed activations, adapters of a saved and loaded model, evaluation."""
    make().save_pretrained(tmp_path / "model")
    model = adapted(RwkvForCausalLM.from_pretrained(tmp_path / "model"))
    options = {
        "max_steps": 12,
        "learning_rate": 0.02,
        "optim": "adamw_torch",
        "gradient_checkpointing": True,
        "gradient_checkpointing_kwargs": {"use_reentrant": False},
        "eval_strategy": "steps",
        "eval_steps": 6,
    }
    run = trainer(model, tmp_path / "run", **options)
    run.eval_dataset = run.train_dataset
    before = copy.deepcopy(run.evaluate())["eval_loss"]
    run.train()
    assert run.evaluate()["eval_loss"] < 0.9 * before
