import socket
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator
from conftest import leave_together, tiny_config, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from no_gpu import pretended_gpu
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.nn.parallel import DistributedDataParallel

from modeling_mrl_redimnet import MatryoshkaMarginClassifier, MRLReDimNetForXVector
from mrl_redimnet.training import sampled_classifier as partial
from mrl_redimnet.training.sampled_classifier import SampledRows

SPEAKERS, BATCH, STEPS = 30, 6, 8
OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.5, momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd_plain": lambda parameters: torch.optim.SGD(parameters, lr=0.5),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, weight_decay=0.05),
    "amsgrad": lambda parameters: torch.optim.AdamW(parameters, lr=0.05, amsgrad=True),
}


class Learner(nn.Module):
    """Something before the classifier that learns as well."""

    def __init__(self, **changes):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Linear(20, 32)
        self.classifier = MatryoshkaMarginClassifier(tiny_config(num_speakers=SPEAKERS, **changes))

    def forward(self, inputs, labels):
        return self.classifier(self.encoder(inputs), labels)[0]


def batch_of(step: int, size: int = BATCH) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(size, 20, generator=generator), torch.randint(SPEAKERS, (size,), generator=generator)


def train(learner, optimizer, rows: SampledRows | None = None, steps=range(STEPS)):
    for step in steps:
        inputs, labels = batch_of(step)
        if rows is not None:
            labels = rows.begin(labels, step, optimizer)
        optimizer.zero_grad()
        learner(inputs, labels).backward()
        optimizer.step()
        if rows is not None:
            rows.end(optimizer)


def sampled_learner(sample: int, kind: str = "sgd", **changes):
    learner = Learner(**changes)
    rows = SampledRows(learner.classifier, sample, seed=5)
    return learner, rows, OPTIMIZERS[kind](learner.parameters())


# ----------------------------------------------------------------------------------------------------------------------
# Training


@pytest.mark.parametrize("changes", [{}, dict(sub_centers=2, hard_negatives=3), dict(loss="sphereface2")])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_sample_of_all_speakers_trains_as_the_whole_classifier_does(kind, changes):
    whole = Learner(**changes)
    train(whole, OPTIMIZERS[kind](whole.parameters()))
    learner, rows, optimizer = sampled_learner(SPEAKERS, kind, **changes)
    train(learner, optimizer, rows)
    assert not torch.equal(rows.weight, Learner(**changes).classifier.weight)
    with rows.gathered():
        for name, tensor in whole.state_dict().items():
            torch.testing.assert_close(learner.state_dict()[name], tensor, rtol=1e-5, atol=1e-6, msg=name)


def test_momentum_of_a_row_waits_until_it_is_drawn_again():
    """Against a loop that keeps every row's buffer itself."""
    learner, rows, optimizer = sampled_learner(8)
    reference = Learner()
    weight = reference.classifier.weight.detach().clone()
    momentum, encoder = torch.zeros_like(weight), OPTIMIZERS["sgd"](reference.encoder.parameters())
    for step in range(STEPS):
        inputs, labels = batch_of(step)
        local = rows.begin(labels, step, optimizer)
        used = rows.rows_in_use.clone()
        optimizer.zero_grad()
        learner(inputs, local).backward()
        optimizer.step()
        rows.end(optimizer)

        reference.classifier.weight = nn.Parameter(weight[used])
        encoder.zero_grad()
        reference(inputs, local).backward()
        encoder.step()
        gradient = reference.classifier.weight.grad + 1e-3 * weight[used]
        momentum[used] = 0.9 * momentum[used] + gradient
        weight[used] -= 0.5 * (gradient + 0.9 * momentum[used])
    assert (momentum != 0).any(1).sum() > 8  # different rows in different steps
    torch.testing.assert_close(rows.weight, weight)
    torch.testing.assert_close(rows.state["momentum_buffer"], momentum)


@pytest.mark.parametrize("centers", [1, 3])
def test_rows_that_are_not_drawn_stay(centers):
    learner, rows, optimizer = sampled_learner(8, "adamw", sub_centers=centers)
    before = rows.weight.clone()
    inputs, labels = batch_of(0)
    local = rows.begin(labels, 0, optimizer)
    assert learner.classifier.weight.shape == (8 * centers, 32) and learner.classifier.num_speakers == 8
    own = learner.classifier.weight.detach().unflatten(0, (8, centers))[local]
    assert torch.equal(own, before.unflatten(0, (SPEAKERS, centers))[labels])
    learner(inputs, local).backward()
    optimizer.step()
    rows.end(optimizer)
    moved = (rows.weight != before).any(1).unflatten(0, (SPEAKERS, centers)).any(1)
    assert moved.sum() == 8 and moved[labels].all()


def test_the_parameter_stays_one_and_the_same():
    learner, rows, optimizer = sampled_learner(8)
    parameter, address = learner.classifier.weight, learner.classifier.weight.data_ptr()
    train(learner, optimizer, rows)
    with rows.gathered():
        assert learner.classifier.weight.shape == (SPEAKERS, 32)
    assert learner.classifier.weight is parameter and parameter.data_ptr() == address


def test_a_new_optimiser_begins_without_state():
    learner, rows, optimizer = sampled_learner(8, "adamw")
    train(learner, optimizer, rows)
    second = OPTIMIZERS["sgd"](learner.parameters())
    rows.begin(batch_of(0)[1], 99, second)
    rows.end(second)  # of a step that was left out
    assert rows.state == {}


# ----------------------------------------------------------------------------------------------------------------------
# What is drawn


@given(
    labels=st.lists(st.integers(0, SPEAKERS - 1), min_size=1, max_size=40),
    room=st.integers(0, SPEAKERS),
    step=st.integers(0, 10**9),
)
def test_a_step_has_its_speakers_and_a_fixed_count(labels, room, step):
    sample = min(SPEAKERS, len(set(labels)) + room)
    _, rows, _ = sampled_learner(sample)
    present = np.unique(labels)
    drawn = rows.speakers_of_step(present, step)
    assert len(drawn) == len(set(drawn.tolist())) == sample
    assert set(labels) <= set(drawn.tolist()) <= set(range(SPEAKERS))
    assert (np.diff(drawn) > 0).all()
    assert np.array_equal(drawn, rows.speakers_of_step(present, step))


def test_steps_and_seeds_draw_differently_and_every_speaker_alike():
    learner = Learner()
    rows, present = SampledRows(learner.classifier, 10, seed=5), np.array([3, 7])
    steps = [rows.speakers_of_step(present, step) for step in range(2_000)]
    counts = np.bincount(np.concatenate(steps), minlength=SPEAKERS)
    assert (counts[present] == 2_000).all()
    others = np.delete(counts, present)  # each 8 times of 28: 571 +- 20
    assert others.min() > 480 and others.max() < 660
    other_seed = SampledRows(Learner().classifier, 10, seed=6)
    assert not np.array_equal(rows.speakers_of_step(present, 0), other_seed.speakers_of_step(present, 0))


# ----------------------------------------------------------------------------------------------------------------------
# Saving and going on


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_resumed_training_goes_on_to_the_last_bit(kind, tmp_path):
    learner, rows, optimizer = sampled_learner(8, kind)
    train(learner, optimizer, rows, range(4))
    states = {"rows": rows.state_dict(), "optimizer": optimizer.state_dict(), "learner": learner.state_dict()}
    torch.save(states, tmp_path / "state.pt")
    train(learner, optimizer, rows, range(4, STEPS))

    resumed, its_rows, its_optimizer = sampled_learner(8, kind)
    states = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(states["learner"])
    its_optimizer.load_state_dict(states["optimizer"])
    its_rows.load_state_dict(states["rows"])
    train(resumed, its_optimizer, its_rows, range(4, STEPS))
    assert torch.equal(its_rows.weight, rows.weight)
    assert torch.equal(resumed.encoder.weight, learner.encoder.weight)
    assert its_rows.state.keys() == rows.state.keys()
    assert all(torch.equal(its_rows.state[name], rows.state[name]) for name in rows.state)


def test_checkpoints_of_accelerate(tmp_path):
    ends = []
    for resumed in (False, True):
        learner, rows, optimizer = sampled_learner(8, "adamw")
        accelerator = Accelerator(cpu=True)
        learner, optimizer = accelerator.prepare(learner, optimizer)
        accelerator.register_for_checkpointing(rows)
        if resumed:
            accelerator.load_state(str(tmp_path))
        else:
            train(learner, optimizer, rows, range(4))
            accelerator.save_state(str(tmp_path))
        train(learner, optimizer, rows, range(4, STEPS))
        ends.append(rows.weight)
    assert torch.equal(*ends)


def test_a_saved_model_has_all_rows(tmp_path):
    model = tiny_model(tiny_config(num_speakers=SPEAKERS), kind=MRLReDimNetForXVector)
    before = model.classifier.weight.detach().clone()
    rows = SampledRows(model.classifier, 8, seed=0)
    with rows.gathered():
        model.save_pretrained(tmp_path)
    loaded, info = MRLReDimNetForXVector.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    assert torch.equal(loaded.classifier.weight, before)


# ----------------------------------------------------------------------------------------------------------------------
# Mistakes


@pytest.mark.parametrize("sample", [0, SPEAKERS + 1])
def test_a_sample_that_does_not_fit(sample):
    with pytest.raises(ValueError, match=f"sample: got {sample}, expected 1 to the classifier's 30 speakers"):
        SampledRows(Learner().classifier, sample, seed=0)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ([0, 30], "labels: got 0 to 30, the classifier has the speakers 0 to 29"),
        ([-1, 3], "labels: got -1 to 3"),
        ([0, 1, 2, 3, 4], "sample: 4 speakers, but a step's batches have 5: use more"),
    ],
)
def test_labels_that_do_not_fit(labels, message):
    _, rows, optimizer = sampled_learner(4)
    with pytest.raises(ValueError, match=message):
        rows.begin(torch.tensor(labels), 0, optimizer)


def test_steps_begin_and_end_in_turn():
    _, rows, optimizer = sampled_learner(8)
    with pytest.raises(RuntimeError, match="end: no step has begun"):
        rows.end(optimizer)
    rows.begin(torch.tensor([1]), 0, optimizer)
    for call in (lambda: rows.begin(torch.tensor([1]), 0, optimizer), rows.state_dict, rows.gathered().__enter__):
        with pytest.raises(RuntimeError, match=r"call end\(optimizer\)"):
            call()
    rows.end(optimizer)
    rows.begin(torch.tensor([1]), 1, optimizer)


def test_an_optimiser_of_the_whole_classifier_is_refused():
    learner = Learner()
    optimizer = OPTIMIZERS["sgd"](learner.parameters())
    rows = SampledRows(learner.classifier, 8, seed=0)
    with pytest.raises(ValueError, match="it does not train the sampled rows; build it after SampledRows"):
        rows.begin(torch.tensor([1]), 0, optimizer)


def test_an_optimiser_that_keeps_no_state_by_rows_is_refused():
    learner = Learner()
    rows = SampledRows(learner.classifier, 8, seed=0)
    optimizer = torch.optim.Adafactor(learner.parameters())
    with pytest.raises(ValueError, match="optimizer: its state 'row_var' .* is not kept row by row"):
        train(learner, optimizer, rows)


def test_an_optimisers_state_without_that_of_the_rows_is_refused():
    learner, rows, optimizer = sampled_learner(8)
    train(learner, optimizer, rows, range(1))
    other, other_rows, other_optimizer = sampled_learner(8)
    other_optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(RuntimeError, match=r"momentum_buffer\) is not that of the sampled rows \(none\)"):
        train(other, other_optimizer, other_rows)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(seed=6), "seed: the checkpoint's is 6, this run's 5"),
        (dict(sample=9), "sample: the checkpoint's is 9, this run's 8"),
        (dict(weight=torch.zeros(31, 32)), r"the shape \(31, 32\), this one \(30, 32\)"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(changes, message):
    _, rows, _ = sampled_learner(8)
    with pytest.raises(ValueError, match=message):
        rows.load_state_dict(rows.state_dict() | changes)


# ----------------------------------------------------------------------------------------------------------------------
# Several processes


def process(rank: int, port: int, folder: str):
    """One of two: trains on its half of each batch (the second one's is smaller) as DistributedDataParallel does."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout=timedelta(seconds=60), rank=rank, world_size=2)
    learner = Learner(sub_centers=2)
    with torch.no_grad():
        learner.classifier.weight.add_(rank)  # as when each process had its own start
    rows = SampledRows(learner.classifier, 12, seed=5)
    wrapped = DistributedDataParallel(learner)
    optimizer = OPTIMIZERS["adamw"](wrapped.parameters())
    drawn = []
    for step in range(STEPS):
        inputs, labels = (half.chunk(2)[rank] for half in batch_of(step, 12))
        local = rows.begin(labels, step, optimizer)
        drawn.append(rows.rows_in_use)
        optimizer.zero_grad()
        wrapped(inputs, local).backward()
        optimizer.step()
        rows.end(optimizer)
    uneven = torch.arange(3 + rank) + 10 * rank
    rows.begin(uneven, STEPS, optimizer)
    drawn.append(rows.rows_in_use)
    del wrapped  # it holds the process group, which must not be taken apart while Python leaves this function
    leave_together(rank, folder, {"weight": rows.weight, "drawn": drawn, "encoder": learner.encoder.weight})


@pytest.mark.slow
def test_two_processes_train_as_one_with_the_joined_batch(tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, str(tmp_path)), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    for ours, theirs in zip(first["drawn"], second["drawn"], strict=True):
        assert torch.equal(ours, theirs)
    speakers = set((first["drawn"][-1] // 2).tolist())
    assert {0, 1, 2, 10, 11, 12, 13} <= speakers and len(speakers) == 12
    assert torch.equal(first["weight"], second["weight"])

    learner, rows, optimizer = sampled_learner(12, "adamw", sub_centers=2)
    for step in range(STEPS):
        inputs, labels = batch_of(step, 12)
        local = rows.begin(labels, step, optimizer)
        assert torch.equal(rows.rows_in_use, first["drawn"][step])
        optimizer.zero_grad()
        learner(inputs, local).backward()
        optimizer.step()
        rows.end(optimizer)
    torch.testing.assert_close(first["weight"], rows.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(first["encoder"], learner.encoder.weight, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# A GPU


def test_a_step_on_a_gpu_does_not_make_the_host_wait(monkeypatch):
    """With labels as a batch has them, on the CPU."""
    find, labels = partial.gathered_speakers, batch_of(0)[1]

    def found_on_the_cpu(labels):
        with unset_fake_temporarily():
            return find(labels)

    monkeypatch.setattr(partial, "gathered_speakers", found_on_the_cpu)
    with pretended_gpu(monkeypatch) as waits:
        classifier = MatryoshkaMarginClassifier(tiny_config(num_speakers=SPEAKERS))
        classifier.weight = nn.Parameter(torch.empty(SPEAKERS, 32, device="cuda"))
        rows = SampledRows(classifier, 8, seed=5)
        optimizer = OPTIMIZERS["sgd"]([classifier.weight])
        for step in range(2):
            local = rows.begin(labels, step, optimizer)
            classifier.weight.grad = torch.empty_like(classifier.weight)
            optimizer.step()
            rows.end(optimizer)
        assert local.device.type == "cpu" and rows.state["momentum_buffer"].device.type == "cuda"
        assert waits.seen == []
        torch.zeros(3).to("cuda").cpu()
    assert waits.seen == ["copy cpu to cuda (3,)", "copy cuda to cpu (3,)"]
