"""The ways to an adapter's ranks, PEFT's initialisations, and that the base never moves."""

import copy
import math

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import strategies as st
from no_gpu import WithoutFloat64
from peft import PeftModel, get_peft_model_state_dict

from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector
from mrl_redimnet.adapters import fingerprint, strategies
from mrl_redimnet.adapters.strategies import (
    STRATEGIES,
    AdapterPlan,
    Probe,
    Vanilla,
    nested_weights,
    ranks_by_worth,
    truncated,
)

STEPS, CUT = 20, 8


def batches(count: int = 2, crops: int = 12) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    return [
        {
            "input_values": torch.randn(crops, 4000, generator=generator) * 0.1,
            "labels": torch.randint(2, (crops,), generator=generator),
        }
        for _ in range(count)
    ]


def put_on(name: str, kind=MRLReDimNetForXVector, **plan) -> tuple[torch.nn.Module, Vanilla]:
    """A tiny model with an adapter on it (on the encoder, or on a model with its head), and the adapter's strategy."""
    torch.manual_seed(0)
    model = tiny_model(kind=kind)
    host = model.redimnet if kind is MRLReDimNetForXVector else model
    plan = AdapterPlan(**dict(steps=STEPS, rank=4, start_rank=6, cut_step=CUT) | plan)
    return model, STRATEGIES[name](host, plan, Probe(batches, lambda batch: model(**batch).loss))


def trained(name: str, steps: int = STEPS, start=None, **plan) -> tuple[torch.nn.Module, Vanilla, list[str]]:
    """The same after `steps` steps as `train_hf.py` takes them; also what the cut printed."""
    model, strategy = put_on(name, **plan)
    if start is not None:
        strategy.keep_start(start)
    printed, optimizer, data = [], None, batches()
    for step in range(steps):
        if strategy.changes_ranks and step == CUT:
            printed, optimizer = [strategy.cut()], None
        if optimizer is None:
            model.train()
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
        loss = model(**data[step % len(data)]).loss + strategy.penalty()
        loss.backward()
        optimizer.step()
        strategy.after_step(step)
        optimizer.zero_grad()
    return model.eval(), strategy, printed


def answer(model) -> torch.Tensor:
    with torch.no_grad():
        return model(batches()[0]["input_values"]).embeddings


WAYS = {
    "vanilla": {},
    "dynamic": {},
    "warm_up": {},
    "mixed": {},
    "norms": dict(norms=True),
    "warm_up norms": dict(norms=True),
    "dora": dict(options=dict(use_dora=True)),
    "rslora": dict(options=dict(use_rslora=True)),
    "eva": dict(options=dict(init_lora_weights="eva", eva_config=dict(rho=1.5))),
    "pissa": dict(options=dict(init_lora_weights="pissa")),
    "olora": dict(options=dict(init_lora_weights="olora")),
    "segments": dict(segment_ranks=[8, 4, 2]),
    "projection whole": dict(placement="attention", options=dict(modules_to_save=["projection"])),
    "all": dict(placement="all"),
    "mixed all": dict(placement="all"),
    "head": dict(kind=MRLReDimNetForSequenceClassification, task_type="SEQ_CLS"),
    "dynamic head": dict(kind=MRLReDimNetForSequenceClassification, task_type="SEQ_CLS"),
    "warm_up head": dict(kind=MRLReDimNetForSequenceClassification, task_type="SEQ_CLS"),
    "matryoshka": {},
    "matryoshka norms": dict(norms=True),
    "matryoshka all": dict(placement="all", segment_ranks=[6, 2, 1]),
    "matryoshka head": dict(kind=MRLReDimNetForSequenceClassification, task_type="SEQ_CLS"),
}


@pytest.mark.parametrize("way", WAYS)
def test_the_saved_adapter_on_a_fresh_base_answers_as_the_trained_one(way, tmp_path):
    """By plain PEFT, and with the base's own weights bit-identical, statistics too (PiSSA and OLoRA move them)."""
    name = way.split()[0] if way.split()[0] in STRATEGIES else "vanilla"
    kind = WAYS[way].get("kind", MRLReDimNetForXVector)
    base = tiny_model(kind=kind)
    model, strategy, _ = trained(name, start=tmp_path / "start", **WAYS[way])
    strategy.save(tmp_path)
    before, after = answer(base), answer(model)
    assert not torch.allclose(before, after, atol=1e-2)
    PeftModel.from_pretrained(base if kind is not MRLReDimNetForXVector else base.redimnet, tmp_path)
    torch.testing.assert_close(answer(base.eval()), after, rtol=1e-4, atol=1e-4)
    assert (fingerprint(model) == fingerprint(tiny_model(kind=kind))) == (way not in ("pissa", "olora"))
    assert sorted(path.name for path in tmp_path.glob("*.*")) == ["adapter_config.json", "adapter_model.safetensors"]


def test_the_base_is_bit_identical_after_training_in_train_mode():
    """Every tensor and buffer by itself; a fingerprint rounds."""
    model, _, _ = trained("vanilla")
    untouched = tiny_model(kind=MRLReDimNetForXVector).redimnet.state_dict()
    own = {name.replace(".base_layer", ""): t for name, t in model.redimnet.state_dict().items() if "lora_" not in name}
    assert own.keys() == untouched.keys()
    assert [name for name in own if not torch.equal(own[name], untouched[name])] == []


def test_adapted_norms_move_their_statistics_and_leave_the_bases():
    model, strategy, _ = trained("vanilla", norms=True)
    state = get_peft_model_state_dict(strategy.peft)
    base = tiny_model(kind=MRLReDimNetForXVector).redimnet.state_dict()
    moved = [name for name in state if name.endswith("running_mean")]
    assert len(moved) == len([name for name in base if name.endswith("running_mean")])
    assert all(not torch.equal(state[name], base[name.removeprefix("base_model.model.")]) for name in moved)


def test_only_the_adapter_and_the_classifier_train():
    model, strategy = put_on("vanilla")
    names = [name for name, p in model.named_parameters() if p.requires_grad]
    assert "classifier.weight" in names
    assert all("lora_" in name for name in names if name != "classifier.weight")


def test_segment_ranks_are_those_of_the_projection():
    _, strategy = put_on("vanilla", segment_ranks=[8, 4, 2])
    ranks = strategy.ranks()
    assert [ranks[f"projection.segments.{i}"] for i in range(3)] == [8, 4, 2]
    assert {rank for name, rank in ranks.items() if "projection" not in name} == {4}
    layers = dict(strategy.peft.base_model.model.named_modules())
    assert {layers[f"projection.segments.{i}"].scaling["default"] for i in range(3)} == {2.0}


# ---------------------------------------------------------------- warm-up


def test_warm_up_cuts_every_pair_to_its_best_approximation():
    """The saved function is the truncated SVD of the high-rank one, and the report is of the two."""
    model, strategy = put_on("warm_up")
    generator = torch.Generator().manual_seed(1)
    for name, parameter in strategy.peft.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.1
    name = "projection.segments.1"
    layer = model.redimnet.get_submodule(name)
    whole = layer.get_delta_weight("default").detach().clone()
    printed = strategy.cut()
    layer = model.redimnet.get_submodule(name)
    left, values, right = torch.linalg.svd(whole)
    best = (left[:, :4] * values[:4]) @ right[:4]
    torch.testing.assert_close(layer.get_delta_weight("default"), best, rtol=1e-4, atol=1e-5)
    assert layer.r == {"default": 4} and not strategy.changes_ranks
    assert "Rank 6 cut to 4" in printed and "mean cosine of 0." in printed
    assert fingerprint(model) == fingerprint(tiny_model(kind=MRLReDimNetForXVector))


def test_warm_up_is_settled_only_after_the_cut():
    _, strategy, printed = trained("warm_up", steps=CUT)
    assert not printed and not strategy.settled(CUT)
    strategy.cut()
    assert strategy.settled(CUT)


def test_warm_up_that_begins_after_the_cut_begins_with_the_final_rank():
    _, strategy = put_on("warm_up", first_step=CUT)
    assert set(strategy.ranks().values()) == {4} and not strategy.changes_ranks


@given(rows=st.integers(1, 9), columns=st.integers(1, 9), rank=st.integers(1, 9), kept=st.integers(1, 9))
def test_truncation_keeps_what_the_svd_keeps(rows, columns, rank, kept):
    generator = torch.Generator().manual_seed(rows * 1000 + columns * 100 + rank * 10 + kept)
    down = torch.randn(rank, columns, generator=generator, dtype=torch.float64)
    up = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    new_down, new_up, share = truncated(down, up, kept)
    values = torch.linalg.svdvals(up @ down)
    lost = (up @ down - new_up @ new_down).square().sum()
    assert math.isclose(float(lost), float(values[kept:].square().sum()), abs_tol=1e-9)
    assert math.isclose(share, 1 - float(lost / values.square().sum()), abs_tol=1e-9)


# ---------------------------------------------------------------- dynamic and mixed


def test_dynamic_ends_with_the_budget_of_ranks_spread_over_layers():
    model, strategy, _ = trained("dynamic")
    ranks = strategy.ranks()
    assert sum(ranks.values()) == 4 * len(ranks) and len(set(ranks.values())) > 1
    assert strategy.settled(STEPS) and not strategy.settled(STEPS // 2)


def test_dynamic_adds_the_orthogonality_term():
    _, strategy = put_on("dynamic")
    terms = []
    for name, p in strategy.peft.named_parameters():
        if "lora_A" in name or "lora_B" in name:
            square = (p @ p.T if "lora_A" in name else p.T @ p).detach()
            terms.append(float((square - torch.eye(len(square))).norm()))
    assert math.isclose(float(strategy.penalty()), 0.5 * sum(terms) / len(terms), rel_tol=1e-5)


def test_dynamic_goes_on_from_its_kept_state_as_if_never_stopped():
    """Importances of the directions are part of it, beside the tensors and the optimiser."""
    _, strategy, _ = trained("dynamic", steps=6)
    _, fresh = put_on("dynamic")
    fresh.state().load_state_dict(copy.deepcopy(strategy.state().state_dict()))
    allocators = [s.peft.base_model.rankallocator for s in (strategy, fresh)]
    assert allocators[0].ipt.keys() == allocators[1].ipt.keys() and len(allocators[0].ipt)
    assert all(torch.equal(allocators[0].exp_avg_ipt[k], allocators[1].exp_avg_ipt[k]) for k in allocators[0].ipt)
    assert strategy.config.rank_pattern == fresh.config.rank_pattern


def test_mixed_gives_ranks_to_layers_with_large_gradients_within_the_budget():
    gradients = {"flat": torch.zeros(8, 8), "one": torch.zeros(8, 8), "many": torch.eye(8)}
    gradients["one"][0, 0] = 5.0
    assert ranks_by_worth(gradients, 3) == {"one": 1, "many": 8}  # nine ranks of 16 parameters
    ranks = ranks_by_worth({"small": torch.eye(2) * 3, "large": torch.eye(20)}, 1)
    assert ranks == {"small": 2}  # of 44 parameters 2 x 4 are spent, and one rank more of the large layer takes 40


def test_mixed_stays_within_the_parameters_of_a_uniform_rank():
    counts = {}
    for name in ("vanilla", "mixed"):
        _, strategy = put_on(name)
        counts[name] = sum(p.numel() for p in strategy.peft.parameters() if p.requires_grad)
    assert 0.9 * counts["vanilla"] < counts["mixed"] <= counts["vanilla"]
    assert len(set(strategy.ranks().values())) > 1


def test_mixed_resumes_with_the_ranks_it_was_given():
    ranks = {"projection.segments.0": 3, "trunk.stages.1.context.expand": 1}
    _, strategy = put_on("mixed", known_ranks=ranks)
    assert strategy.ranks() == ranks


# ---------------------------------------------------------------- matryoshka


def test_matryoshka_trains_the_mean_of_the_nested_adapters():
    """Of ranks 1, 2, 4 and 6, whose scaling is larger the lower the rank is."""
    model, strategy, _ = trained("matryoshka", rank=6)
    assert strategy.nested_ranks == [1, 2, 4, 6]
    layer = model.redimnet.get_submodule("projection.segments.1")
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        added = layer(x) - layer.base_layer(x)
        nested = [layer.scaling["default"] * 6 / k * x @ down[:k].T @ up[:, :k].T for k in strategy.nested_ranks]
    torch.testing.assert_close(added, sum(nested) / 4, rtol=1e-4, atol=1e-5)
    assert nested[0].abs().max() > 1e-3


@given(size=st.integers(1, 70), ranks=st.sets(st.integers(1, 70), min_size=1))
def test_nested_adapters_weigh_as_much_as_the_whole(size, ranks):
    """Whatever the ranks, the weights fall and add up to the layer's size, as those of a plain adapter do."""
    weights = nested_weights(sorted(ranks), size).tolist()
    assert len(weights) == size and weights == sorted(weights, reverse=True) and min(weights) >= 0
    assert math.isclose(sum(weights), size, rel_tol=1e-5)


def test_matryoshka_goes_on_from_a_checkpoint_of_its_tensors():
    """The diagonal is the plan's: no checkpoint holds it."""
    model, _, _ = trained("matryoshka")
    again, _ = put_on("matryoshka")
    assert again.load_state_dict(model.state_dict()).missing_keys == []
    assert not [name for name in model.state_dict() if "diagonal" in name]
    torch.testing.assert_close(answer(again.eval()), answer(model))


# ---------------------------------------------------------------- refusals


@pytest.mark.parametrize(
    ("name", "plan", "message"),
    [
        ("dynamic", dict(placement="all"), "strategy dynamic finds ranks itself"),
        ("dynamic", dict(segment_ranks=[4, 2, 2]), "strategy dynamic finds ranks itself"),
        ("mixed", dict(segment_ranks=[4, 2, 2]), "strategy mixed finds ranks itself"),
        ("vanilla", dict(placement="attention", segment_ranks=[4, 2, 2]), "segment_ranks: the placement 'attention'"),
        ("vanilla", dict(rank=16, options=dict(init_lora_weights="eva")), "batch_size 12 is below rank x rho = 32"),
        ("matryoshka", dict(options=dict(use_dora=True)), "leave out use_dora"),
        ("matryoshka", dict(options=dict(init_lora_weights="pissa")), "leave out use_dora, lora_bias and init_lora"),
    ],
)
def test_plans_that_cannot_be_are_refused(name, plan, message):
    with pytest.raises(ValueError, match=message):
        put_on(name, **plan)


def test_an_adapter_that_has_learnt_nothing_is_not_saved(tmp_path):
    _, strategy = put_on("dynamic")
    with pytest.raises(ValueError, match="learnt nothing"):
        strategy.save(tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Other devices, other processes, steps that are left out


def test_a_resumed_rank_allocation_is_where_the_adapter_is():
    """Checkpoints are read to the CPU; "meta" stands for a GPU."""
    _, begun, _ = trained("dynamic", steps=4)
    state = copy.deepcopy(begun.state().state_dict())
    model, strategy = put_on("dynamic")
    model.to("meta")
    strategy.state().load_state_dict(state)
    allocator = strategy.peft.base_model.rankallocator
    for name in ("ipt", "exp_avg_ipt", "exp_avg_unc"):
        kept = getattr(allocator, name)
        assert kept.keys() == state[name].keys() and {tensor.device.type for tensor in kept.values()} == {"meta"}


@pytest.mark.parametrize("overflows", [{1}, {2, 3, 9}, {14}, {13, 14, 15}, {0, 14, 19}])
def test_dynamic_ranks_reach_their_budget_though_steps_are_left_out(overflows):
    """As GradScaler leaves them out in float16, before and at the last allocation of ranks (step 14), and after it."""
    model, strategy = put_on("dynamic")
    layers, data = len(strategy.ranks()), batches()
    optimizer = torch.optim.AdamW([p for p in model.train().parameters() if p.requires_grad], lr=1e-2)
    for step in range(STEPS):
        (model(**data[step % len(data)]).loss + strategy.penalty()).backward()
        if step in overflows:
            for parameter in strategy.peft.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(math.inf)
        else:
            optimizer.step()
        strategy.after_step(step, skipped=step in overflows)
        for kept in (strategy.peft.base_model.rankallocator.exp_avg_ipt or {}).values():
            assert torch.isfinite(kept).all()
        optimizer.zero_grad()
    assert 0 < sum(strategy.ranks().values()) <= 4 * layers


@pytest.mark.slow
def test_ranks_from_data_are_those_of_the_first_process(monkeypatch):
    """Elsewhere the same data may round to others."""

    def first_process_found(objects):
        (found,) = objects
        return [{name: 2 if isinstance(value, int) else value[:2] for name, value in found.items()}]

    monkeypatch.setattr(strategies, "broadcast_object_list", first_process_found)
    for _, strategy in (put_on("mixed"), put_on("vanilla", **WAYS["eva"])):
        assert set(strategy.ranks().values()) == {2}


def test_ranks_are_found_on_a_device_without_float64():
    torch.manual_seed(0)
    down, up = torch.randn(6, 20), torch.randn(9, 6)
    expected = truncated(down, up, 3)
    found = truncated(down.as_subclass(WithoutFloat64), up.as_subclass(WithoutFloat64), 3)
    for one, other in zip(expected[:2], found[:2], strict=True):
        assert torch.equal(one, other.as_subclass(torch.Tensor))
    gradients = {"a": torch.randn(5, 7), "b": torch.randn(3, 4)}
    there = {name: gradient.as_subclass(WithoutFloat64) for name, gradient in gradients.items()}
    assert ranks_by_worth(there, 2) == ranks_by_worth(gradients, 2)
