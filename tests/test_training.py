"""Schedules, what is trained, guards against a run that cannot learn, checkpoints that are whole or not there."""

import json
import math
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config, tiny_model, waves
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import nn
from training_runs import reset_accelerate

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import (
    MatryoshkaMarginClassifier,
    MRLReDimNetForSequenceClassification,
    MRLReDimNetForXVector,
)
from mrl_redimnet.adapters.strategies import AdapterPlan, Probe, Vanilla
from mrl_redimnet.training.checkpoints import Progress, load_checkpoint, newest_step, save_checkpoint
from mrl_redimnet.training.guards import ChanceGuard, chance_loss
from mrl_redimnet.training.optimizer import build_optimizer, check_optimizer, freeze, part_of
from mrl_redimnet.training.reading import RENAMED, make_recipe
from mrl_redimnet.training.recipe import LOSS_FIELDS, PARTS, Recipe
from mrl_redimnet.training.schedules import (
    Timing,
    augmentation_strength,
    due,
    learning_rate_at,
    margin_at,
    prefix_weights_at,
    rise,
)

# ---------------------------------------------------------------- schedules

SHAPES = [(1000, 0.1), (400, 0.05), (10, 0.05), (7, 0.5), (3, 0.0), (1, 0.05), (2, 0.0)]


SCHEDULES = pytest.mark.parametrize("schedule", ["cosine", "exponential"])


@SCHEDULES
@pytest.mark.parametrize(("steps", "warmup"), SHAPES)
def test_learning_rate_rises_then_falls(steps, warmup, schedule):
    recipe = make_recipe(steps=steps, warmup=warmup, learning_rate=1.0, final_learning_rate=0.01, schedule=schedule)
    rates = [learning_rate_at(step, recipe, recipe.schedule.steps) for step in range(steps)]
    top = rates.index(max(rates))
    assert top <= math.ceil(warmup * steps)
    assert rates[:top] == sorted(rates[:top]) and rates[top:] == sorted(rates[top:], reverse=True)
    assert all(0 < rate <= 1 for rate in rates)


@SCHEDULES
@pytest.mark.parametrize(("steps", "warmup"), [(1000, 0.1), (400, 0.05), (3, 0.0)])
def test_learning_rate_endpoints(steps, warmup, schedule):
    recipe = make_recipe(steps=steps, warmup=warmup, learning_rate=1.0, final_learning_rate=0.01, schedule=schedule)
    start = int(warmup * steps)
    assert learning_rate_at(0, recipe, recipe.schedule.steps) == pytest.approx(1 / (start + 1))
    assert learning_rate_at(start, recipe, recipe.schedule.steps) == pytest.approx(1.0)
    assert learning_rate_at(steps - 1, recipe, recipe.schedule.steps) == pytest.approx(0.01)


def test_learning_rate_is_halfway_at_half_the_fall():
    recipe = make_recipe(steps=101, warmup=0.0, learning_rate=1.0, final_learning_rate=0.0)
    assert learning_rate_at(50, recipe, recipe.schedule.steps) == pytest.approx(0.5)


def test_margin_rises_between_its_shares():
    recipe = make_recipe(steps=100, margin_schedule=[0.2, 0.6])
    margins = [margin_at(step, recipe, recipe.schedule.steps, full=0.3) for step in range(100)]
    assert margins[:21] == [0.0] * 21 and margins[60:] == [0.3] * 40
    assert margins[40] == pytest.approx(0.15)
    assert margins == sorted(margins)


def test_an_exponential_falls_by_the_same_factor_every_step():
    recipe = make_recipe(steps=101, warmup=0.0, learning_rate=1.0, final_learning_rate=1e-4, schedule="exponential")
    rates = np.array([learning_rate_at(step, recipe, recipe.schedule.steps) for step in range(101)])
    assert rates[1:] / rates[:-1] == pytest.approx(np.full(100, 1e-4**0.01))
    assert rates[50] == pytest.approx(1e-2)


def test_margin_may_be_full_from_the_first_step():
    recipe = make_recipe(steps=10, margin_schedule=[0.0, 0.0])
    assert [margin_at(step, recipe, recipe.schedule.steps, 0.2) for step in range(3)] == [0.2, 0.2, 0.2]


SHARES = st.floats(0, 1)


@given(st.lists(SHARES, min_size=2, max_size=2, unique=True), st.lists(SHARES, min_size=2, max_size=6))
def test_what_rises_is_0_before_1_after_and_never_falls(between, shares):
    start, end = sorted(between)
    values = {share: rise(share, [start, end]) for share in sorted(shares)}
    assert list(values.values()) == sorted(values.values()) and all(0 <= value <= 1 for value in values.values())
    assert all(value == 1 for share, value in values.items() if share >= end)
    assert all(value == 0 for share, value in values.items() if share <= start)


@pytest.mark.parametrize("at", [0.3, 0.5, 1.0])
def test_a_margin_may_come_all_at_once(at):
    recipe = make_recipe(steps=10, margin_schedule=[at, at])
    assert [margin_at(step, recipe, recipe.schedule.steps, 0.2) for step in range(10)] == [
        0.2 if step / 10 >= at else 0.0 for step in range(10)
    ]


def test_augmentation_rises_with_the_steps_whatever_their_crops():
    for crops in (4, 48, 1000):
        recipe = make_recipe(steps=50, augmentation_schedule=[0.2, 0.6])
        strengths = [augmentation_strength(step * crops, crops, recipe, 50) for step in range(51)]
        assert strengths[:11] == [0.0] * 11 and strengths[30:] == [1.0] * 21
        assert strengths[20] == pytest.approx(0.5) and strengths == sorted(strengths)
    assert augmentation_strength(0, 4, make_recipe(), 200) == augmentation_strength(2**40, 4, make_recipe(), 200) == 1.0


# ---------------------------------------------------------------- prefixes

PREFIXES = tiny_config(embedding_size=64, matryoshka_dims=[4, 8, 16, 32, 64])


def test_all_prefixes_are_trained_with_the_configured_weights_unless_told():
    assert prefix_weights_at(3, make_recipe(), 20, PREFIXES) is None


@st.composite
def prefix_recipes(draw) -> Recipe:
    shares = SHARES.filter(lambda share: share < 1)
    shares = [*draw(st.lists(shares, min_size=4, max_size=4)), 0.0] if draw(st.booleans()) else []
    per_step = draw(st.integers(0 if shares else 1, 7))
    return make_recipe(steps=20, prefix_starts=shares, prefixes_per_step=per_step, seed=draw(st.integers(0, 99)))


@given(prefix_recipes(), st.integers(0, 19), st.none() | st.lists(st.floats(0.1, 3), min_size=5, max_size=5))
def test_prefixes_of_a_step(recipe, step, weights):
    """The longest always; of those that have joined as many as are asked for; each with its own weight; by the step."""
    config = tiny_config(embedding_size=64, matryoshka_dims=[4, 8, 16, 32, 64], prefix_weights=weights)
    drawn = prefix_weights_at(step, recipe, recipe.schedule.steps, config)
    full = weights or [1.0] * 5
    joined = [k for k, share in enumerate(recipe.schedule.prefix_starts or [0.0] * 5) if step >= share * 20]
    used = [k for k, weight in enumerate(drawn) if weight > 0]
    assert 4 in used and set(used) <= set(joined)
    assert all(drawn[k] == full[k] for k in used)
    assert len(used) == min(recipe.loss.prefixes_per_step or 5, len(joined))
    assert prefix_weights_at(step, recipe, recipe.schedule.steps, config) == drawn


def test_a_prefix_joins_at_its_share_of_the_steps():
    recipe = make_recipe(steps=20, prefix_starts=[0.8, 0.5, 0.5, 0.1, 0.0])
    joined = [prefix_weights_at(step, recipe, recipe.schedule.steps, PREFIXES) for step in range(20)]
    first = [min(step for step in range(20) if joined[step][k]) for k in range(5)]
    assert first == [16, 10, 10, 2, 0]
    assert all(weights[k] == (step >= first[k]) for step, weights in enumerate(joined) for k in range(5))


def test_every_prefix_is_drawn_as_often_as_every_other():
    recipe = make_recipe(steps=600, prefixes_per_step=3)
    drawn = np.array([prefix_weights_at(step, recipe, recipe.schedule.steps, PREFIXES) for step in range(600)])
    assert drawn.mean(0) == pytest.approx([0.5] * 4 + [1.0], abs=0.07)
    assert len({tuple(weights) for weights in drawn}) == 6  # all pairs of four


def test_drawn_prefixes_are_set_by_the_seed():
    drawn = [
        [prefix_weights_at(step, make_recipe(prefixes_per_step=2, seed=seed), 20, PREFIXES) for step in range(20)]
        for seed in (0, 0, 1)
    ]
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_model_takes_a_steps_prefixes():
    torch.manual_seed(0)
    model = MRLReDimNetForXVector(tiny_config()).train()
    weights = prefix_weights_at(4, make_recipe(prefixes_per_step=2), 20, model.config)
    answer = model(torch.stack(waves(6000, 6000)), labels=torch.tensor([0, 1]), prefix_weights=weights)
    assert torch.isfinite(answer.prefix_losses).tolist() == [weight > 0 for weight in weights]


# ---------------------------------------------------------------- optimiser


@pytest.fixture
def model() -> MRLReDimNetForXVector:
    torch.manual_seed(0)
    return MRLReDimNetForXVector(tiny_config()).train()


def test_optimizer_has_every_tensor(model):
    optimizer = build_optimizer(model, make_recipe(weight_decay=0.1))
    groups = {group["weight_decay"]: {id(p) for p in group["params"]} for group in optimizer.param_groups}
    for name, parameter in model.named_parameters():
        decays = parameter.dim() > 1 and not name.endswith("mix.logits")
        assert id(parameter) in groups[0.1 if decays else 0.0], name
    assert id(model.classifier.weight) in groups[0.1]


def test_frozen_tensors_are_left_out(model):
    model.redimnet.requires_grad_(False)
    optimizer = build_optimizer(model, make_recipe())
    assert [p is model.classifier.weight for group in optimizer.param_groups for p in group["params"]] == [True]


def test_a_classifier_left_out_is_noticed(model):
    optimizer = torch.optim.AdamW(model.redimnet.parameters())
    with pytest.raises(ValueError, match=r"wrong: classifier.weight \(0 groups\)\."):
        check_optimizer(model, optimizer)


def test_a_tensor_in_two_groups_is_noticed(model):
    optimizer = build_optimizer(model, make_recipe())
    optimizer.param_groups[1]["params"].append(model.classifier.weight)
    with pytest.raises(ValueError, match=r"classifier.weight \(2 groups\)"):
        check_optimizer(model, optimizer)


def test_a_tensor_of_another_model_is_noticed(model):
    optimizer = build_optimizer(model, make_recipe())
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(3))]})
    with pytest.raises(ValueError, match="not the model's"):
        check_optimizer(model, optimizer)


# ---------------------------------------------------------------- what is trained, how fast


def parts(model, wanted) -> set[str]:
    """The modules just below the encoder, and the classifier, whose parameters are `wanted`."""
    names = [name for name, parameter in model.named_parameters() if wanted(parameter)]
    return {name.removeprefix("redimnet.").split(".")[0] for name in names}


@pytest.mark.parametrize(
    ("finetune", "expected"),
    [
        ("all", {"front_end", "trunk", "pooling", "projection", "classifier"}),
        ("head", {"pooling", "projection", "classifier"}),
        ("projection", {"projection", "classifier"}),
    ],
)
def test_each_part_is_trained_whole_and_the_rest_not_at_all(finetune, expected):
    model = MRLReDimNetForXVector(tiny_config("norm_batch"))  # whose front end has something to train, too
    freeze(model, make_recipe(finetune=finetune), step=0, steps=200)
    assert parts(model, lambda p: p.requires_grad) == expected
    everything = {"front_end", "trunk", "pooling", "projection", "classifier"}
    assert parts(model, lambda p: not p.requires_grad) == everything - expected


def test_the_trunk_waits_until_its_share_of_the_steps():
    model = MRLReDimNetForXVector(tiny_config("norm_batch"))
    recipe = make_recipe(trunk_frozen_until=0.3, steps=15)  # 4.5 steps: from step 4 on
    for step in (0, 3, 4, 14, 0):  # and back: a freeze knows no past
        freeze(model, recipe, step, 15)
        waiting = {"front_end", "trunk"} if step < 4 else set()
        assert parts(model, lambda p: not p.requires_grad) == waiting


@pytest.mark.parametrize("finetune", ["all", "head", "projection"])
def test_frozen_parts_keep_their_tensors_and_statistics_in_training(finetune):
    torch.manual_seed(0)
    model = MRLReDimNetForXVector(tiny_config("norm_batch")).train()
    recipe = make_recipe(finetune=finetune, trunk_frozen_until=0.5 if finetune == "all" else 0.0)
    freeze(model, recipe, 0, 200)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = build_optimizer(model, recipe)
    for group in optimizer.param_groups:
        group["lr"] = 0.1 * group["lr_scale"]
    model(torch.stack(waves(6000, 6000)), labels=torch.tensor([0, 1])).loss.backward()
    optimizer.step()
    moved = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    frozen = ("redimnet.front_end.", "redimnet.trunk.") + ("redimnet.pooling.",) * (finetune == "projection")
    assert not [name for name in moved if name.startswith(frozen)]
    assert moved >= {
        "classifier.weight",
        "redimnet.projection.segments.0.weight",
        "redimnet.projection.norm.running_var",
    }


# ---------------------------------------------------------------- rates and decays by part


@pytest.fixture(scope="module")
def learner() -> MRLReDimNetForXVector:
    """With a front end that has something to train, and a loss that has a bias."""
    return MRLReDimNetForXVector(tiny_config("norm_batch", loss="sphereface2")).train()


def expected_part(name: str) -> str:
    if name.startswith("classifier."):
        return "classifier"
    return "trunk" if name.startswith(("redimnet.trunk.", "redimnet.front_end.")) else "head"


BY_PART = st.dictionaries(st.sampled_from(PARTS), st.sampled_from([1e-5, 1e-3, 0.1]))


@given(
    optimizer=st.sampled_from(["adamw", "sgd"]),
    finetune=st.sampled_from(["all", "head", "projection"]),
    rates=BY_PART,
    decays=BY_PART | st.dictionaries(st.sampled_from(PARTS), st.just(0.0)),
    batch=st.sampled_from([None, 16, 256]),
    processes=st.integers(1, 3),
)
def test_every_tensor_is_in_one_group_with_its_parts_rate_and_decay(
    learner, optimizer, finetune, rates, decays, batch, processes
):
    recipe = make_recipe(
        optimizer=optimizer,
        finetune=finetune,
        learning_rate=1e-2,
        weight_decay=0.05,
        part_learning_rates=rates,
        part_weight_decays=decays,
        reference_batch=batch,
        batch_size=32,
        gradient_accumulation=2,
    )
    freeze(learner, recipe, 0, 200)
    groups = build_optimizer(learner, recipe, processes).param_groups
    group_of = {id(parameter): group for group in groups for parameter in group["params"]}
    trained = {name: p for name, p in learner.named_parameters() if p.requires_grad}
    assert sum(len(group["params"]) for group in groups) == len(trained) == len(group_of)
    growth = 1.0 if batch is None else 32 * 2 * processes / batch
    for name, parameter in trained.items():
        group, part = group_of[id(parameter)], expected_part(name)
        assert group["lr_scale"] * 1e-2 == pytest.approx(growth * rates.get(part, 1e-2)), name
        decaying = parameter.dim() > 1 and not name.endswith("mix.logits")
        assert group["weight_decay"] == (decays.get(part, 0.05) if decaying else 0.0), name


def test_parts_are_those_of_the_model(learner):
    found = {name: part_of(name) for name, _ in learner.named_parameters()}
    assert found == {name: expected_part(name) for name in found}
    assert set(found.values()) == set(PARTS)
    assert found["classifier.bias"] == "classifier" and found["redimnet.front_end.norm.weight"] == "trunk"


@pytest.mark.parametrize("kind", [MRLReDimNetForXVector, MRLReDimNetForSequenceClassification])
def test_an_adapters_tensors_belong_to_the_layers_that_it_adapts(kind):
    """Rates of parts are theirs, too; the classifier is one whether it travels with the adapter or stays behind."""
    model = tiny_model(kind=kind)
    with_head = kind is MRLReDimNetForSequenceClassification
    host, task = (model, "SEQ_CLS") if with_head else (model.redimnet, "FEATURE_EXTRACTION")
    Vanilla(host, AdapterPlan(steps=5, rank=2, placement="all", task_type=task), Probe(list, lambda batch: None))
    recipe = make_recipe(
        finetune="adapter", learning_rate=1e-3, part_learning_rates={"trunk": 1e-4, "classifier": 1e-2}
    )
    scale_of = {id(p): g["lr_scale"] for g in build_optimizer(model, recipe).param_groups for p in g["params"]}
    seen = set()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        layer = next((part for part in ("classifier", "trunk", "projection", "pooling") if f"{part}." in name), None)
        scale = {"classifier": 10.0, "trunk": 0.1}.get(layer, 1.0)
        assert layer is not None and scale_of[id(parameter)] == pytest.approx(scale), name
        seen.add(layer)
    assert seen == {"trunk", "projection", "pooling", "classifier"}


def test_without_rates_of_their_own_all_learn_alike(model):
    assert {group["lr_scale"] for group in build_optimizer(model, make_recipe(), processes=8).param_groups} == {1.0}


def test_rates_grow_with_the_crops_of_a_step(model):
    recipe = make_recipe(batch_size=64, gradient_accumulation=2, learning_rate=0.1, reference_batch=64)
    assert {group["lr_scale"] for group in build_optimizer(model, recipe, processes=4).param_groups} == {8.0}
    assert {group["lr_scale"] for group in build_optimizer(model, recipe).param_groups} == {2.0}


def test_rates_grow_up_to_a_limit(model):
    recipe = make_recipe(batch_size=256, learning_rate=0.1, reference_batch=64)
    assert {group["lr_scale"] for group in build_optimizer(model, recipe, processes=2).param_groups} == {8.0}
    for processes in (4, 8, 64):  # 1.2 at the highest
        assert {group["lr_scale"] for group in build_optimizer(model, recipe, processes).param_groups} == {12.0}
    recipe = make_recipe(batch_size=256, reference_batch=64, max_learning_rate_growth=20)
    assert {group["lr_scale"] for group in build_optimizer(model, recipe, processes=8).param_groups} == {20.0}
    recipe = make_recipe(batch_size=16, reference_batch=64)
    assert {group["lr_scale"] for group in build_optimizer(model, recipe).param_groups} == {0.25}


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.0, False)])
def test_sgd_is_nesterovs(model, momentum, nesterov):
    optimizer = build_optimizer(model, make_recipe(optimizer="sgd", momentum=momentum))
    assert type(optimizer) is torch.optim.SGD
    assert {(group["momentum"], group["nesterov"]) for group in optimizer.param_groups} == {(momentum, nesterov)}


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_a_step_moves_each_part_at_its_rate(optimizer):
    """As `train_hf.py` sets it: the schedule's rate times each group's scale. At a rate of 0 nothing moves."""
    torch.manual_seed(0)
    model = MRLReDimNetForXVector(tiny_config()).train()
    recipe = make_recipe(
        optimizer=optimizer, learning_rate=1e-2, part_learning_rates={"trunk": 0.0, "classifier": 1e-3}
    )
    steps = build_optimizer(model, recipe)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for group in steps.param_groups:
        group["lr"] = group["lr_scale"] * 1e-2
    model(torch.stack(waves(6000, 6000)), labels=torch.tensor([0, 1])).loss.backward()
    steps.step()
    moved = {part_of(name) for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {"head", "classifier"}


# ---------------------------------------------------------------- chance level


def classifier(speakers: int, dims: list[int], seed: int = 0):
    config = tiny_config(num_speakers=speakers, embedding_size=dims[-1], matryoshka_dims=dims)
    torch.manual_seed(seed)
    return MRLReDimNetForXVector(config).classifier


def chance_formula(speakers: int, dim: int, scale: float, margin: float) -> float:
    return math.log(speakers) + scale**2 / (2 * dim) + scale * math.sin(margin)


@pytest.mark.parametrize("options", [dict(sub_centers=3), dict(loss="sphereface2")])
def test_chance_is_that_of_speakers_not_of_rows(options):
    """Labels are drawn among the speakers, and the loss is what a fresh classifier of that kind has."""
    config = tiny_config(num_speakers=40, **options)
    torch.manual_seed(0)
    rows = MRLReDimNetForXVector(config).classifier
    mean, deviation = chance_loss(rows, 0.0)
    embeddings = torch.randn(1, 32, generator=torch.Generator().manual_seed(9)).expand(40, 32)
    with torch.no_grad():
        loss = rows(embeddings, torch.arange(40), 0.0)[0].item()
    assert math.isfinite(mean) and abs(loss - mean) <= max(0.05 * mean, 4 * deviation)


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


# ---------------------------------------------------------------- when things happen


@pytest.mark.parametrize("processes", [1, 2, 8, 64])
def test_what_is_given_in_passes_does_not_follow_the_number_of_processes(processes):
    """VoxCeleb2 in batches of 256: ten of 120 passes are averaged, however many steps they are."""
    epoch_steps = 1_092_009 / (256 * processes)
    steps = round(120 * epoch_steps)
    given = dict(steps=steps, weight_averaging="10 epochs", evaluate_every="1 epoch", checkpoint_every="0.5 epochs")
    timing = Timing.of(make_recipe(**given, chance_until="2 epochs", warmup=0.05), epoch_steps)
    assert timing.averaged == 10
    assert timing.evaluate_every == epoch_steps and timing.checkpoint_every == epoch_steps / 2
    assert timing.chance_until == pytest.approx(8 * epoch_steps, rel=1e-3)
    evaluations = [step for step in range(1, steps + 1) if due(step, timing.evaluate_every)]
    assert 119 <= len(evaluations) <= 120 and abs(evaluations[9] - 10 * epoch_steps) <= 1


def test_what_is_given_in_shares_follows_the_run():
    recipe = make_recipe(
        steps=400, weight_averaging=0.25, evaluate_every=0.05, checkpoint_every=0.1, chance_until=0.2, warmup=0
    )
    assert Timing.of(recipe, epoch_steps=7.0) == Timing(400, 20.0, 40.0, 5, 80.0)


def test_what_is_given_in_steps_stays():
    recipe = make_recipe(steps=400, evaluate_every=50, checkpoint_every=100, chance_until=30, warmup=0.1)
    assert Timing.of(recipe, epoch_steps=7.0) == Timing(400, 50, 100, 0, 70)
    assert [step for step in range(1, 401) if due(step, 50)] == list(range(50, 401, 50))


@given(every=st.floats(0.3, 50), steps=st.integers(1, 300))
def test_what_comes_every_so_often_comes_as_often_as_it_fits(every, steps):
    times = sum(due(step, every) for step in range(1, steps + 1))
    assert times == min(steps, int(steps / every)) or every < 1


def test_an_end_of_the_run_without_two_evaluations_has_no_mean():
    recipe = make_recipe(steps=400, weight_averaging=0.1, evaluate_every=100)
    with pytest.raises(ValueError, match="weight_averaging: 0.1 of this run is 40 steps, in which evaluate_every: 100"):
        Timing.of(recipe, epoch_steps=7.0)


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


@pytest.mark.parametrize(("loss", "told"), [(4.0, False), (9.9, False), (10.1, True), (25.0, True)])
def test_rows_that_were_taken_over_are_to_start_below_chance(loss, told):
    """Above it they may be those of other people; that is told, and the run has to learn like any other."""
    guard = ChanceGuard(mean=10.0, deviation=0.01, deadline=100, fresh=False)
    said = guard.check_start(loss)
    assert (said is not None) is told
    assert not told or f"the first loss is {loss:.2f}" in said and "reuse_classifier: false" in said
    with pytest.raises(RuntimeError, match="nothing is being learnt"):
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
    "sub-centers": lambda speakers: tiny_config(num_speakers=speakers, sub_centers=3),
    "hard negatives": lambda speakers: tiny_config(num_speakers=speakers, hard_negatives=5, hard_negative_margin=0.1),
    "sphereface2": lambda speakers: tiny_config(num_speakers=speakers, loss="sphereface2"),
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
def test_a_mistaken_loss_does_not(mistake, monkeypatch):
    torch.manual_seed(0)
    model = MRLReDimNetForXVector(MRLReDimNetConfig.from_size("nano", num_speakers=1000)).train()
    guard = ChanceGuard(*chance_loss(model.classifier, 0.0, 32), deadline=0)
    margin = 0.3 if mistake == "margin" else 0.0
    guard.check_start(first_loss(model, 32, 0.0, 0))  # without the mistake it passes
    if mistake == "scale":
        model.classifier.scale = 64.0
    if mistake == "normalisation":
        dots = lambda classifier, embeddings, rows: classifier.scale * embeddings @ rows.T  # noqa: E731
        monkeypatch.setattr(MatryoshkaMarginClassifier, "scaled_cosines", dots)
    with pytest.raises(RuntimeError, match="labels, scale or normalisation"):
        guard.check_start(first_loss(model, 32, margin, 0))


# ---------------------------------------------------------------- checkpoints


class Run:
    """A linear layer in training: all that a checkpoint needs."""

    def __init__(self, folder: Path, seed: int = 0):
        reset_accelerate()
        torch.manual_seed(seed)
        self.folder, self.accelerator = folder, Accelerator(cpu=True)
        model = nn.Linear(3, 2)
        self.model, self.optimizer = self.accelerator.prepare(model, torch.optim.AdamW(model.parameters()))

    def train(self):
        self.accelerator.backward(self.model(torch.randn(4, 3)).square().sum())
        self.optimizer.step()
        self.optimizer.zero_grad()

    def save(self, step: int, recipe: Recipe | None = None, **options):
        save_checkpoint(self.accelerator, self.folder, Progress(step), recipe or make_recipe(), 200, **options)

    def load(self, recipe: Recipe | None = None, steps: int = 200) -> Progress | None:
        return load_checkpoint(self.accelerator, self.folder, recipe or make_recipe(), steps)

    def names(self) -> list[str]:
        return sorted(path.name for path in self.folder.iterdir())


@pytest.fixture
def run(tmp_path):
    yield Run(tmp_path / "checkpoints")
    reset_accelerate()


def test_a_checkpoint_restores_weights_optimizer_and_progress(run):
    run.train()
    place = {"settings": {"seed": 0}, "places": [[0, 1, 2, 3, 4, 5]], "last": None}
    progress = Progress(7, 0.25, 5, without_better=2, ended=True, problems=[["a.wav", "empty"]], crops=place)
    save_checkpoint(run.accelerator, run.folder, progress, make_recipe(), 200)
    other = Run(run.folder, seed=1)
    assert other.load() == progress
    for each in (run, other):
        torch.manual_seed(5)
        each.train()  # the moments count, too
    assert torch.equal(run.model.weight, other.model.weight) and torch.equal(run.model.bias, other.model.bias)


def test_progress_before_the_first_evaluation_is_restored(run):
    run.save(3)
    assert run.load() == Progress(step=3, best_score=math.inf, best_step=-1, without_better=0, ended=False, crops=None)


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
    assert run.load().step == 3 and run.names() == ["step-00000003"]
    run.save(6)
    assert run.load().step == 6 and run.names() == ["step-00000003", "step-00000006"]


@pytest.mark.parametrize(("room", "settings"), [(0, 0), (600, 0), (3000, 0), (60_000, 100_000)])
def test_a_full_disk_leaves_the_earlier_checkpoint_and_nothing_in_the_way(run, room, settings):
    """Whichever file it is that has no room: weights, moments, generators, settings."""
    run.train()
    run.save(3)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, hard))  # writing more bytes into a file is an error
    try:
        with pytest.raises((OSError, RuntimeError, SafetensorError)):
            run.save(6, make_recipe(columns={"audio": "x" * (settings + 1)}))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert run.load().step == 3 and run.names() == ["step-00000003"]
    run.save(6)
    assert run.load().step == 6


def test_leftovers_of_a_killed_run_are_written_over(run):
    half = run.folder / "writing-00000006"
    half.mkdir(parents=True)
    (half / "stale.bin").write_bytes(b"half")
    run.save(6)
    assert run.names() == ["step-00000006"] and not (run.folder / "step-00000006" / "stale.bin").exists()
    assert run.load().step == 6


def test_another_number_of_processes_is_refused(run):
    """Their batches would be others."""
    run.save(3)
    settings = run.folder / "step-00000003" / "settings.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "processes": 4}))
    with pytest.raises(ValueError, match="step-00000003 was written by 4 processes, now there are 1"):
        run.load()


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
    run.save(3, make_recipe(batch_size=8, speed_perturb=[1.0]))
    with pytest.raises(ValueError) as error:
        run.load(make_recipe(batch_size=16, speed_perturb=[1.0, 0.9]))
    assert "step-00000003 belongs to a run with other settings" in str(error.value)
    assert "batch_size (was 8, is 16)" in str(error.value) and "speed_perturb (was [1.0], is [1.0, 0.9])" in str(
        error.value
    )
    assert "seed" not in str(error.value)


def test_another_number_of_steps_is_refused(run):
    """Of a recipe in epochs it depends on the speech and on the crops of a step."""
    run.save(3, make_recipe(epochs=2))
    assert run.load(make_recipe(epochs=2)).step == 3
    with pytest.raises(ValueError, match=r"other settings: schedule.steps \(was 200, is 150\)"):
        run.load(make_recipe(epochs=2), steps=150)


def test_settings_that_change_no_weight_may_change(run):
    run.save(3)
    free = dict(output="elsewhere", workers=4, log_every=1, evaluate_every=7, checkpoint_every=2, tracker="none")
    free |= dict(report_dims=[8], bootstrap_samples=10, chance_until=5, base_repository="me/base")
    assert run.load(make_recipe(**free)).step == 3


@pytest.mark.parametrize(
    "change",
    [
        dict(finetune="head"),
        dict(domain="telephony"),
        dict(rank=4),
        dict(clean_ratio=0.2),
        dict(augmentations=[{"kind": "gain"}]),
        dict(crop_seconds=[2.0, 3.0]),
        dict(part_learning_rates={"trunk": 1e-4}),
        dict(utterances_per_speaker=2),
    ],
)
def test_settings_of_what_is_trained_may_not(run, change):
    run.save(3)
    with pytest.raises(ValueError, match=rf"other settings: \w+\.{next(iter(change))} "):
        run.load(make_recipe(**change))


# Settings that there were none of at first, and what the others were called.
OF_TEACHERS = ("loss.margin_weight", "loss.teacher_loss", "loss.teacher_hears")
NEWER = ("optimizer.max_learning_rate_growth", "data.evaluation_speakers", "model.reuse_classifier", "run.chance_until")
NEWER += OF_TEACHERS
EARLIER_NAMES = {new: old for old, new in RENAMED.items() if old != "chance_steps"}
EARLIER_NAMES |= {"model.start": "model", "optimizer.algorithm": "optimizer", "schedule.lr_schedule": "schedule"}


def as_older_run(run, **settings):
    """The checkpoint as an earlier version would have written it: without groups, and without some settings."""
    file = run.folder / "step-00000003/settings.json"
    stored = json.loads(file.read_text())
    values = {f"{group}.{name}": value for group, those in stored["recipe"].items() for name, value in those.items()}
    old = {EARLIER_NAMES.get(n, n.partition(".")[2]): value for n, value in values.items() if n not in NEWER}
    old = {name: value for name, value in old.items() if name not in ("name", "size", *LOSS_FIELDS)}
    old |= {"steps": stored["steps"], "model": values["model.start"] or values["model.size"] or "nano"}
    file.write_text(json.dumps({"recipe": old | settings, "processes": 1}))


def test_a_run_from_before_there_were_groups_goes_on(run):
    run.save(3, make_recipe(rank=4, gradient_accumulation=2, size="b0"))
    as_older_run(run)
    assert "accumulation" in (run.folder / "step-00000003/settings.json").read_text()
    assert run.load(make_recipe(rank=4, gradient_accumulation=2, size="b0")).step == 3
    with pytest.raises(ValueError, match=r"other settings: .*adapter.rank \(was 4, is 8\)"):
        run.load()


@pytest.mark.parametrize(("teacher", "hears"), [(None, "clean"), ("b6", "same")])
def test_a_run_from_before_teachers_were_of_several_kinds_goes_on(run, teacher, hears):
    run.save(3, make_recipe(teacher=teacher))
    file = run.folder / "step-00000003/settings.json"
    stored = json.loads(file.read_text())
    for name in OF_TEACHERS:
        del stored["recipe"]["loss"][name.partition(".")[2]]
    file.write_text(json.dumps(stored))
    assert run.load(make_recipe(teacher=teacher, teacher_hears=hears)).step == 3
    with pytest.raises(ValueError, match=r"other settings: loss.margin_weight \(was 1.0, is 2.0\)"):
        run.load(make_recipe(teacher=teacher, teacher_hears=hears, margin_weight=2))


def test_the_loss_of_a_run_from_before_there_were_groups_was_among_the_options_of_its_model(run):
    run.save(3)
    as_older_run(run, model_options={"loss": "sphereface2", "scale": 20.0, "window_seconds": 30.0})
    recipe = dict(loss="sphereface2", scale=20.0, model_options={"window_seconds": 30.0})
    assert run.load(make_recipe(**recipe)).step == 3
    with pytest.raises(ValueError, match=r"other settings: loss.scale \(was 20.0, is 30.0\)"):
        run.load(make_recipe(**recipe | dict(scale=30.0)))


def test_a_run_from_before_there_were_some_settings_goes_on(run):
    run.save(3)
    as_older_run(run)
    assert run.load().step == 3


def test_a_run_whose_rates_were_not_limited_does_not_go_on_with_a_limit(run):
    recipe = dict(batch_size=2048, reference_batch=64)
    run.save(3, make_recipe(**recipe))
    as_older_run(run)
    with pytest.raises(ValueError, match=r"max_learning_rate_growth \(was None, is 12.0\)"):
        run.load(make_recipe(**recipe))


def test_a_run_that_averaged_a_number_of_evaluations_does_not_go_on(run):
    run.save(3)
    as_older_run(run, average_last=10)
    with pytest.raises(ValueError, match=r"other settings: optimizer.weight_averaging \(was 10, is '10 epochs'\)"):
        run.load(make_recipe(weight_averaging="10 epochs"))


def test_the_newest_step_is_that_of_the_newest_whole_checkpoint(run):
    assert newest_step(run.folder) == 0
    run.save(9)
    run.save(123)
    (run.folder / "writing-00000200").mkdir()
    (run.folder / "step-300").mkdir()
    assert newest_step(run.folder) == 123


def test_a_checkpoint_says_what_it_belongs_to(run):
    run.save(3, make_recipe(seed=4))
    settings, progress = (
        json.loads((run.folder / "step-00000003" / name).read_text()) for name in ("settings.json", "progress-0.json")
    )
    assert (
        settings["recipe"]["run"]["seed"] == 4
        and (settings["steps"], settings["processes"]) == (200, 1)
        and progress["step"] == 3
    )
