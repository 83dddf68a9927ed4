"""Schedules, what is trained, guards against a run that cannot learn, checkpoints that are whole or not there."""

import json
import math
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, GradientState
from conftest import tiny_config, waves
from torch import nn

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.recipe import Recipe
from mrl_redimnet.training import (
    ChanceGuard,
    Progress,
    build_optimizer,
    chance_loss,
    check_optimizer,
    freeze,
    learning_rate_at,
    load_checkpoint,
    margin_at,
    newest_step,
    save_checkpoint,
)

# ---------------------------------------------------------------- schedules

SHAPES = [(1000, 0.1), (400, 0.05), (10, 0.05), (7, 0.5), (3, 0.0), (1, 0.05), (2, 0.0)]


@pytest.mark.parametrize(("steps", "warmup"), SHAPES)
def test_learning_rate_rises_then_falls(steps, warmup):
    recipe = Recipe(steps=steps, warmup=warmup, learning_rate=1.0, final_learning_rate=0.01)
    rates = [learning_rate_at(step, recipe) for step in range(steps)]
    top = rates.index(max(rates))
    assert top <= math.ceil(warmup * steps)
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 < rate <= 1 for rate in rates)


@pytest.mark.parametrize(("steps", "warmup"), [(1000, 0.1), (400, 0.05), (3, 0.0)])
def test_learning_rate_endpoints(steps, warmup):
    recipe = Recipe(steps=steps, warmup=warmup, learning_rate=1.0, final_learning_rate=0.01)
    start = int(warmup * steps)
    assert learning_rate_at(0, recipe) == pytest.approx(1 / (start + 1))
    assert learning_rate_at(start, recipe) == pytest.approx(1.0)
    assert learning_rate_at(steps - 1, recipe) == pytest.approx(0.01)


def test_learning_rate_is_halfway_at_half_the_fall():
    recipe = Recipe(steps=101, warmup=0.0, learning_rate=1.0, final_learning_rate=0.0)
    assert learning_rate_at(50, recipe) == pytest.approx(0.5)


def test_margin_rises_between_its_shares():
    recipe = Recipe(steps=100, margin_rise=[0.2, 0.6])
    margins = [margin_at(step, recipe, full=0.3) for step in range(100)]
    assert margins[:21] == [0.0] * 21 and margins[60:] == [0.3] * 40
    assert margins[40] == pytest.approx(0.15)
    assert margins == sorted(margins)


def test_margin_may_be_full_from_the_second_step():
    recipe = Recipe(steps=10, margin_rise=[0.0, 0.0])
    assert [margin_at(step, recipe, 0.2) for step in range(3)] == [0.0, 0.2, 0.2]


# ---------------------------------------------------------------- optimiser


@pytest.fixture
def model() -> MRLReDimNetForXVector:
    torch.manual_seed(0)
    return MRLReDimNetForXVector(tiny_config()).train()


def test_optimizer_has_every_tensor(model):
    optimizer = build_optimizer(model, Recipe(weight_decay=0.1))
    groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    for name, parameter in model.named_parameters():
        decays = parameter.dim() > 1 and not name.endswith("mix.logits")
        assert id(parameter) in groups[0.1 if decays else 0.0], name
    assert id(model.classifier.weight) in groups[0.1]


def test_frozen_tensors_are_left_out(model):
    model.redimnet.requires_grad_(False)
    optimizer = build_optimizer(model, Recipe())
    assert [p is model.classifier.weight for group in optimizer.param_groups for p in group["params"]] == [True]


def test_a_classifier_left_out_is_noticed(model):
    optimizer = torch.optim.AdamW(model.redimnet.parameters())
    with pytest.raises(ValueError, match=r"wrong: classifier.weight \(0 groups\)\."):
        check_optimizer(model, optimizer)


def test_a_tensor_in_two_groups_is_noticed(model):
    optimizer = build_optimizer(model, Recipe())
    optimizer.param_groups[1]["params"].append(model.classifier.weight)
    with pytest.raises(ValueError, match=r"classifier.weight \(2 groups\)"):
        check_optimizer(model, optimizer)


def test_a_tensor_of_another_model_is_noticed(model):
    optimizer = build_optimizer(model, Recipe())
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ValueError, match="not the model's"):
        check_optimizer(model, optimizer)


# ---------------------------------------------------------------- what is trained, how fast


def parts(model, wanted) -> set[str]:
    """The modules just below the encoder, and the classifier, whose parameters are `wanted`."""
    names = [name for name, parameter in model.named_parameters() if wanted(parameter)]
    return {name.removeprefix("redimnet.").split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("trains", "expected"),
    [
        ("all", {"front_end", "trunk", "pooling", "projection", "classifier"}),
        ("head", {"pooling", "projection", "classifier"}),
        ("projection", {"projection", "classifier"}),
    ],
)
def test_each_part_is_trained_whole_and_the_rest_not_at_all(trains, expected):
    model = MRLReDimNetForXVector(tiny_config("norm_batch"))  # whose front end has something to train, too
    freeze(model, Recipe(trains=trains), step=0)
    assert parts(model, lambda p: p.requires_grad) == expected
    everything = {"front_end", "trunk", "pooling", "projection", "classifier"}
    assert parts(model, lambda p: not p.requires_grad) == everything - expected


def test_the_trunk_waits_until_its_share_of_the_steps():
    model = MRLReDimNetForXVector(tiny_config("norm_batch"))
    recipe = Recipe(trunk_frozen_until=0.3, steps=15)  # 4.5 steps: from step 4 on
    for step in (0, 3, 4, 14, 0):  # and back: a freeze knows no past
        freeze(model, recipe, step)
        waiting = {"front_end", "trunk"} if step < 4 else set()
        assert parts(model, lambda p: not p.requires_grad) == waiting


@pytest.mark.parametrize("trains", ["all", "head", "projection"])
def test_frozen_parts_keep_their_tensors_and_statistics_in_training(trains):
    torch.manual_seed(0)
    model = MRLReDimNetForXVector(tiny_config("norm_batch")).train()
    recipe = Recipe(trains=trains, trunk_frozen_until=0.5 if trains == "all" else 0.0)
    freeze(model, recipe, 0)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, recipe)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_scale"]
    model(torch.stack(waves(6000, 6000)), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    frozen = ("redimnet.front_end.", "redimnet.trunk.") + ("redimnet.pooling.",) * (trains == "projection")
    assert not [name for name in moved if name.startswith(frozen)]
    assert moved >= {
        "classifier.weight",
        "redimnet.projection.segments.0.weight",
        "redimnet.projection.norm.running_var",
    }


def test_the_trunk_has_its_own_learning_rate_in_groups_of_its_own():
    model = MRLReDimNetForXVector(tiny_config("norm_batch"))
    recipe = Recipe(learning_rate=1e-3, trunk_learning_rate=1e-4, weight_decay=0.1)
    group_of = {id(p): group for group in build_optimizer(model, recipe).param_groups for p in group["params"]}
    assert len(group_of) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        of_trunk = name.startswith(("redimnet.trunk.", "redimnet.front_end."))
        decays = parameter.dim() > 1 and not name.endswith("mix.logits")
        assert group_of[id(parameter)]["lr_scale"] == pytest.approx(0.1 if of_trunk else 1.0), name
        assert group_of[id(parameter)]["weight_decay"] == (0.1 if decays else 0.0), name


def test_without_one_all_learn_alike(model):
    assert {group["lr_scale"] for group in build_optimizer(model, Recipe()).param_groups} == {1.0}


def test_a_trunk_that_is_not_trained_whole_has_no_learning_rate_of_its_own(model):
    """Adapters in the trunk learn at the run's rate."""
    recipe = Recipe(trains="adapter", learning_rate=1e-3, trunk_learning_rate=1e-4)
    assert {group["lr_scale"] for group in build_optimizer(model, recipe).param_groups} == {1.0}


# ---------------------------------------------------------------- chance level


def classifier(speakers: int, dims: list[int], seed: int = 0):
    config = tiny_config(num_speakers=speakers, embedding_size=dims[-1], matryoshka_dims=dims)
    torch.manual_seed(seed)
    return MRLReDimNetForXVector(config).classifier


def chance_formula(speakers: int, dim: int, scale: float, margin: float) -> float:
    return math.log(speakers) + scale**2 / (2 * dim) + scale * math.sin(margin)


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5])
@pytest.mark.parametrize(("speakers", "dim"), [(2000, 256), (2000, 512), (1000, 1024)])
def test_chance_is_the_formula_where_speakers_and_dimensions_are_many(speakers, dim, margin):
    mean, _ = chance_loss(classifier(speakers, [dim]), margin, crops=16)
    assert mean == pytest.approx(chance_formula(speakers, dim, 32.0, margin), abs=0.25)


def test_chance_is_below_the_formula_where_speakers_are_few():
    """Why chance is measured, not computed."""
    mean, _ = chance_loss(classifier(50, [64]), 0.0)
    assert mean < chance_formula(50, 64, 32.0, 0.0) - 2


def test_chance_over_prefixes_is_their_mean():
    torch.manual_seed(0)
    both, first, whole = classifier(300, [64, 256]), classifier(300, [64]), classifier(300, [256])
    with torch.no_grad():
        whole.weight.copy_(both.weight)
        first.weight.copy_(both.weight[:, :64])
    expected = (chance_loss(first, 0.2)[0] + chance_loss(whole, 0.2)[0]) / 2
    assert chance_loss(both, 0.2)[0] == pytest.approx(expected, rel=0.03)  # other directions were drawn


def test_measuring_chance_draws_nothing_from_the_global_generator():
    rows = classifier(20, [32])
    before = torch.get_rng_state()
    assert chance_loss(rows, 0.1) == chance_loss(rows, 0.1)
    assert torch.equal(torch.get_rng_state(), before)


# ---------------------------------------------------------------- guard


def test_guard_accepts_a_start_at_chance():
    guard = ChanceGuard(mean=10.0, deviation=0.01, deadline=100)
    for loss in (9.6, 10.0, 10.4):
        guard.check_start(loss)
    ChanceGuard(mean=10.0, deviation=0.5, deadline=100).check_start(11.9)


@pytest.mark.parametrize("loss", [9.4, 10.6, math.log(8), math.nan])
def test_guard_stops_a_start_elsewhere(loss):
    guard = ChanceGuard(mean=10.0, deviation=0.01, deadline=100)
    with pytest.raises(RuntimeError, match=rf"first loss is {loss:.2f}, a fresh classifier's is 10.00 \+- 0.01"):
        guard.check_start(loss)


def test_guard_stops_a_run_that_learns_nothing_from_the_deadline_on():
    guard = ChanceGuard(mean=10.0, deviation=0.1, deadline=100)
    guard.check_progress(99, 10.0)
    guard.check_progress(100, 9.0)
    guard.check_progress(100, 12.0, margin_cost=3.0)
    with pytest.raises(RuntimeError, match=r"After 100 steps the loss is 9.90, not below chance level \(10.00\)"):
        guard.check_progress(100, 9.9)


def test_guard_stops_a_run_whose_loss_is_no_number():
    with pytest.raises(RuntimeError, match="loss is nan"):
        ChanceGuard(mean=10.0, deviation=0.1, deadline=100).check_progress(200, math.nan)


def first_loss(model, crops: int, margin: float, seed: int) -> float:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(model.config.num_speakers, (crops,), generator=generator)
    with torch.no_grad():
        return model(torch.stack(waves(*[4000] * crops, seed=seed)), labels=labels, margin=margin).loss.item()


CONFIGS = {
    "tiny": lambda speakers: tiny_config(num_speakers=speakers),
    "embedding_norm": lambda speakers: tiny_config(num_speakers=speakers, embedding_norm=True),
    "smoothed": lambda speakers: tiny_config(num_speakers=speakers, label_smoothing=0.1, prefix_weights=[1, 0, 3]),
    "nano": lambda speakers: MRLReDimNetConfig.from_size("nano", num_speakers=speakers),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("speakers", [8, 1000])
def test_a_fresh_model_starts_at_chance(kind, speakers):
    for seed, (crops, margin) in enumerate([(4, 0.0), (4, 0.2), (16, 0.0), (16, 0.3)]):
        torch.manual_seed(seed)
        model = MRLReDimNetForXVector(CONFIGS[kind](speakers)).train()
        guard = ChanceGuard(*chance_loss(model.classifier, margin, crops), deadline=0)
        guard.check_start(first_loss(model, crops, margin, seed))


@pytest.mark.parametrize("mistake", ["scale", "normalisation", "margin"])
def test_a_mistaken_loss_does_not(mistake):
    torch.manual_seed(0)
    model = MRLReDimNetForXVector(MRLReDimNetConfig.from_size("nano", num_speakers=1000)).train()
    guard = ChanceGuard(*chance_loss(model.classifier, 0.0, 32), deadline=0)
    margin = 0.3 if mistake == "margin" else 0.0
    if mistake == "scale":
        model.classifier.scale = 64.0
    if mistake == "normalisation":
        model.classifier.cosines = lambda e: iter([e @ model.classifier.weight.T])
        model.classifier.prefix_weights = [1.0]
    with pytest.raises(RuntimeError, match="labels, scale or normalisation"):
        guard.check_start(first_loss(model, 32, margin, 0))


# ---------------------------------------------------------------- checkpoints


class Run:
    """A linear layer in training: all that a checkpoint needs."""

    def __init__(self, folder: Path, seed: int = 0):
        AcceleratorState._reset_state(True)
        GradientState._reset_state()
        torch.manual_seed(seed)
        self.folder, self.accelerator = folder, Accelerator(cpu=True)
        model = nn.Linear(3, 2)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))

    def train(self):
        self.accelerator.backward(self.model(torch.randn(4, 3)).square().sum())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int, recipe: Recipe | None = None, **options):
        save_checkpoint(self.accelerator, self.folder, Progress(step), recipe or Recipe(), **options)

    def load(self, recipe: Recipe | None = None) -> Progress | None:
        return load_checkpoint(self.accelerator, self.folder, recipe or Recipe())

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def run(tmp_path):
    yield Run(tmp_path / "checkpoints")
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


def test_a_checkpoint_restores_weights_optimizer_and_progress(run):
    run.train()
    progress = Progress(step=7, best_score=0.25, best_step=5, problems=[("a.wav", "empty")])
    save_checkpoint(run.accelerator, run.folder, progress, Recipe())
    other = Run(run.folder, seed=1)
    restored = other.load()
    assert (restored.step, restored.best_score, restored.best_step) == (7, 0.25, 5)
    assert [tuple(problem) for problem in restored.problems] == progress.problems
    for each in (run, other):
        torch.manual_seed(5)
        each.train()  # the moments count, too
    assert torch.equal(run.model.weight, other.model.weight) and torch.equal(run.model.bias, other.model.bias)


def test_progress_before_the_first_evaluation_is_restored(run):
    run.save(3)
    assert run.load() == Progress(step=3, best_score=math.inf, best_step=-1)


def test_no_checkpoint_is_no_error(run):
    assert run.load() is None


def test_the_newest_checkpoint_counts(run):
    run.save(9)
    run.save(10)
    assert run.load().step == 10


def test_a_checkpoint_that_was_not_finished_is_ignored(run):
    run.save(3)
    half = run.folder / "writing-00000006"
    half.mkdir()
    (half / "model.safetensors").write_bytes(b"half")
    assert run.load().step == 3


def test_other_names_are_ignored(run):
    run.save(3)
    (run.folder / "step-9").mkdir()
    (run.folder / "step-00000009").write_text("a file")
    (run.folder / "step-00000009.old").mkdir()
    assert run.load().step == 3


def test_an_error_while_writing_leaves_the_earlier_checkpoint(run, monkeypatch):
    def full_disk(folder):
        Path(folder, "optimizer.bin").write_bytes(b"half")
        raise OSError("No space left on device")

    run.save(3)
    with monkeypatch.context() as patch:
        patch.setattr(run.accelerator, "save_state", full_disk)
        with pytest.raises(OSError, match="No space"):
            run.save(6)
    assert run.load().step == 3
    run.save(6)  # over what the first attempt left
    assert run.load().step == 6 and run.names() == ["step-00000003", "step-00000006"]


def test_writing_one_again_replaces_it(run):
    run.save(3)
    run.save(3)
    assert run.names() == ["step-00000003"] and run.load().step == 3


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_only_the_newest_remain(run, keep):
    for step in (1, 2, 10, 100):
        run.save(step, keep=keep)
    assert run.names() == ["step-00000001", "step-00000002", "step-00000010", "step-00000100"][-keep:]


def test_other_settings_are_refused_by_name(run):
    run.save(3, Recipe(batch_size=8, speeds=[1.0]))
    with pytest.raises(ValueError) as error:
        run.load(Recipe(batch_size=16, speeds=[1.0, 0.9]))
    assert "step-00000003 belongs to a run with other settings" in str(error.value)
    assert "batch_size (was 8, is 16)" in str(error.value) and "speeds (was [1.0], is [1.0, 0.9])" in str(error.value)
    assert "seed" not in str(error.value)


def test_settings_that_change_no_weight_may_change(run):
    run.save(3)
    free = dict(output="elsewhere", workers=4, log_every=1, evaluate_every=7, checkpoint_every=2, tracker="none")
    free |= dict(report_dims=[8], resamples=10, chance_steps=5, base_repository="me/base")
    assert run.load(Recipe(**free)).step == 3


@pytest.mark.parametrize("change", [dict(trains="head"), dict(domain="telephony"), dict(rank=4), dict(base_share=0.2)])
def test_settings_of_what_is_trained_may_not(run, change):
    run.save(3)
    with pytest.raises(ValueError, match=f"other settings: {next(iter(change))} "):
        run.load(Recipe(**change))


def test_the_newest_step_is_that_of_the_newest_whole_checkpoint(run):
    assert newest_step(run.folder) == 0
    run.save(9)
    run.save(123)
    (run.folder / "writing-00000200").mkdir()
    (run.folder / "step-300").mkdir()
    assert newest_step(run.folder) == 123


def test_a_checkpoint_says_what_it_belongs_to(run):
    run.save(3, Recipe(seed=4))
    stored = json.loads((run.folder / "step-00000003" / "progress.json").read_text())
    assert stored["recipe"]["seed"] == 4 and stored["progress"]["step"] == 3
