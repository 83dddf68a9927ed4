"""transformers' own Trainer on both heads: trains, evaluates, saves and resumes, with and without PEFT."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import run_alone, tiny_config, tiny_model, waves
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector
from mrl_redimnet.recordings import FIRST, OTHER_SPEAKER, SAME_SPEAKER
from mrl_redimnet.saving import load_model, save_model

HEADS = (MRLReDimNetForXVector, MRLReDimNetForSequenceClassification)
DATA = [{"input_values": wave, "labels": label % 5} for label, wave in enumerate(waves(*[4_800] * 8))]


def head(kind: type, peft: bool):
    torch.manual_seed(0)
    model = kind(tiny_config(num_labels=5))
    if peft:
        return get_peft_model(model, LoraConfig(target_modules=r".*\.(q_proj|expand)", modules_to_save=["classifier"]))
    return model


def trainer(model, folder, batch: int = 2, **options) -> Trainer:
    options = dict(max_steps=4, save_steps=2, eval_strategy="steps", eval_steps=2, logging_steps=1) | options
    arguments = TrainingArguments(
        str(folder),
        per_device_train_batch_size=batch,
        per_device_eval_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=DATA, eval_dataset=DATA)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("peft", [False, True])
def test_trains_evaluates_saves_and_resumes(kind, peft, tmp_path):
    """Resumed at half of the way it ends with the weights of the run that was not stopped."""
    whole = trainer(head(kind, peft), tmp_path)
    before = {name: p.detach().clone() for name, p in whole.model.named_parameters() if p.requires_grad}
    whole.train()
    trained = {name: p.detach() for name, p in whole.model.named_parameters() if p.requires_grad}
    assert before and not any(torch.equal(before[name], trained[name]) for name in before if "lora_A" not in name)
    assert len([entry for entry in whole.state.log_history if "eval_loss" in entry]) == 2
    resumed = trainer(head(kind, peft), tmp_path)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    for name, parameter in resumed.model.named_parameters():
        if parameter.requires_grad:
            torch.testing.assert_close(parameter.detach(), trained[name], msg=name)
    logits, embeddings = resumed.predict(DATA).predictions[:2]
    assert logits.shape == (8, 5) and embeddings.shape == (8, 32)


@pytest.mark.parametrize("kind", HEADS)
def test_losses_of_parts_add_up_to_that_of_the_whole(kind):
    """Of batches of unequal sizes, too: the model divides by the number that the Trainer counts."""
    model = tiny_model(tiny_config(num_labels=5), kind=kind)  # in eval mode, as batch norms see each batch alone
    values = torch.stack([row["input_values"] for row in DATA])
    labels = torch.tensor([row["labels"] for row in DATA])
    whole = model(values, labels=labels).loss
    parts = [model(values[rows], labels=labels[rows], num_items_in_batch=8).loss for rows in (slice(5), slice(5, 8))]
    torch.testing.assert_close(sum(parts), whole)
    counted = model(values, labels=labels, num_items_in_batch=torch.tensor(16)).loss
    torch.testing.assert_close(counted, whole / 2)


@pytest.mark.parametrize("kind", HEADS)
def test_accumulating_trains_like_one_batch(kind, tmp_path):
    models = []
    for batch, steps in ((4, 1), (2, 2)):
        model = head(kind, False)
        for part in model.redimnet.modules():
            if isinstance(part, torch.nn.BatchNorm1d):
                part.requires_grad_(False)  # those that learn see each batch alone
        options = dict(max_steps=1, eval_strategy="no", gradient_accumulation_steps=steps)
        trainer(model, tmp_path / str(batch), batch, **options).train()
        models.append(dict(model.named_parameters()))
    for parameters in models:  # softmax does not depend on this one: its gradient is rounding, which AdamW blows up
        parameters.pop("redimnet.pooling.attention_out.bias")
    torch.testing.assert_close(*models, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("kind", HEADS)
@pytest.mark.parametrize("peft", [False, True])
def test_with_gradient_checkpointing(kind, peft, tmp_path):
    trainer(head(kind, peft), tmp_path, max_steps=1, gradient_checkpointing=True).train()


def test_flags_that_are_off_ask_for_nothing():
    model = tiny_model(kind=MRLReDimNetForXVector)
    model(torch.stack(waves(6_000)), use_cache=False)
    with pytest.raises(TypeError, match="no use for: use_cache"):
        model(torch.stack(waves(6_000)), use_cache=True)


def test_the_example_trains(tmp_path):
    """transformers' Trainer on a data set of arrays and a model as the Hub has it, as a user runs it."""
    save_model(load_model("nano"), tmp_path / "nano")
    for speaker, file in (("anna", FIRST), ("anna", SAME_SPEAKER), ("bert", OTHER_SPEAKER)):
        (tmp_path / "speakers" / speaker).mkdir(parents=True, exist_ok=True)
        shutil.copy(file, tmp_path / "speakers" / speaker)
    code = Path(__file__).resolve().parents[1] / "examples" / "train_with_trainer.py"
    assert "train_loss" in run_alone(code.read_text(), tmp_path / "nano", tmp_path / "speakers", folder=tmp_path)
    head = MRLReDimNetForXVector.from_pretrained(tmp_path / "runs/trainer/last").classifier
    assert head.weight.shape == (2, 256)
