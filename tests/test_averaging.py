"""Averages against brute force, resumed and restored to the last bit, files that are whole or not there."""

import copy
import json

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from conftest import tiny_config, tiny_model, waves
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from training_runs import reset_accelerate

from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.rotation import rotate
from mrl_redimnet.training import averaging
from mrl_redimnet.training.averaging import Ema, LastWeights


def small(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def train(model: nn.Module, steps: int = 1, seed: int = 0):
    """Steps that move every trainable weight, and the statistics of batch norms."""
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        model(torch.randn(8, 3, generator=generator))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------- exponential


@pytest.mark.parametrize("decay", [0.0, 0.5, 0.9, 0.999])
def test_the_average_is_that_of_the_formula(decay):
    model = small()
    ema = Ema(model, decay)
    expected = {name: value.double().numpy() for name, value in state(model).items()}
    for t in range(120):
        train(model, seed=t)
        ema.update(model)
        d = min(decay, (1 + t) / (10 + t))
        expected = {name: d * expected[name] + (1 - d) * value.double().numpy() for name, value in state(model).items()}
    ema.copy_to(model)
    for name, value in model.state_dict().items():
        if name == "1.num_batches_tracked":
            assert value == 120 and value.dtype == torch.long
        else:
            np.testing.assert_allclose(value.numpy(), expected[name], rtol=1e-5, atol=1e-6, err_msg=name)


def test_batch_norm_statistics_are_averaged_too():
    model = small()
    ema = Ema(model, 0.9)
    first = model[1].running_var.clone()
    train(model)
    ema.update(model)
    torch.testing.assert_close(ema.tensors["1.running_var"], 0.1 * first + 0.9 * model[1].running_var)
    assert not torch.equal(first, model[1].running_var)


def test_what_is_frozen_equals_its_average_to_the_last_bit():
    model = small()
    model[0].requires_grad_(False)
    ema = Ema(model, 0.99)
    frozen = model[0].weight.clone()
    for t in range(50):
        train(model, seed=t)
        ema.update(model)
    ema.copy_to(model)
    assert torch.equal(model[0].weight, frozen)


def test_what_is_frozen_at_first_is_averaged_once_it_moves():
    model = small()
    model[0].requires_grad_(False)
    ema = Ema(model, 0.5)
    model[0].requires_grad_(True)
    for t in range(20):
        train(model, seed=t)
        ema.update(model)
    assert not torch.equal(ema.tensors["0.weight"], model[0].weight)


def test_small_steps_of_bfloat16_weights_add_up():
    model = nn.Linear(1, 1, bias=False).to(torch.bfloat16)
    model.weight.data.fill_(1.0)
    ema = Ema(model, 0.999)
    ema.updates = 10**6
    model.weight.data.fill_(1.25)
    for _ in range(3000):
        ema.update(model)
    assert ema.tensors["weight"].item() == pytest.approx(1.25 - 0.25 * 0.999**3000, rel=1e-4)


def test_the_average_does_not_share_memory_with_the_model():
    model = small()
    ema = Ema(model, 0.9)
    before = {name: value.clone() for name, value in ema.tensors.items()}
    train(model)
    assert same(ema.tensors, before)


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_decay_is_a_share(decay):
    with pytest.raises(ValueError, match=r"decay: got .* from 0 to below 1"):
        Ema(small(), decay)


def averaged(steps: int = 5) -> tuple[nn.Module, Ema]:
    model = small()
    ema = Ema(model, 0.9)
    for t in range(steps):
        train(model, seed=t)
        ema.update(model)
    return model, ema


def test_within_applied_the_model_is_the_average_and_afterwards_itself():
    model, ema = averaged()
    trained, tensors, parameters = state(model), copy.deepcopy(ema.tensors), list(model.parameters())
    with ema.applied(model) as inside:
        assert inside is model and same(state(model), tensors) and not same(tensors, trained)
    assert same(state(model), trained) and same(ema.tensors, tensors)
    assert all(a is b for a, b in zip(parameters, model.parameters(), strict=True))  # an optimiser's, still


def test_applied_restores_after_an_error_and_whatever_was_done_inside():
    model, ema = averaged()
    trained, tensors = state(model), copy.deepcopy(ema.tensors)
    with pytest.raises(KeyboardInterrupt), ema.applied(model):
        train(model, seed=9)
        raise KeyboardInterrupt
    assert same(state(model), trained) and same(ema.tensors, tensors)


def test_training_goes_on_after_applied_as_if_it_had_not_been():
    results = []
    for evaluated in (False, True):
        model = small()
        ema, optimizer = Ema(model, 0.9), torch.optim.AdamW(model.parameters(), lr=0.1)
        for t in range(6):
            model(torch.randn(8, 3, generator=torch.Generator().manual_seed(t))).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            ema.update(model)
            if evaluated:
                with ema.applied(model):
                    model.eval()(torch.ones(2, 3))
                model.train()
        results.append((state(model), ema.tensors))
    assert same(results[0][0], results[1][0]) and same(results[0][1], results[1][1])


def test_a_resumed_average_is_bit_identical(tmp_path):
    model, ema = averaged(3)
    torch.save(ema.state_dict(), tmp_path / "ema.pt")
    torch.save(model.state_dict(), tmp_path / "model.pt")
    resumed = small(seed=7)
    other = Ema(resumed, 0.9)
    resumed.load_state_dict(torch.load(tmp_path / "model.pt"))
    other.load_state_dict(torch.load(tmp_path / "ema.pt", weights_only=True))
    for each, average in ((model, ema), (resumed, other)):
        for t in range(20):
            train(each, seed=100 + t)
            average.update(each)
    assert other.updates == ema.updates == 23 and same(other.tensors, ema.tensors)


def test_a_loaded_state_is_not_shared():
    model, ema = averaged(3)
    other = Ema(model, 0.9)
    other.load_state_dict(ema.state_dict())
    before = copy.deepcopy(ema.tensors)
    train(model)
    other.update(model)
    assert same(ema.tensors, before)


def test_accelerate_stores_and_restores_it(tmp_path):
    reset_accelerate()
    try:
        accelerator = Accelerator(cpu=True)
        model, ema = averaged()
        accelerator.register_for_checkpointing(ema)
        accelerator.save_state(str(tmp_path))
        expected, updates = copy.deepcopy(ema.tensors), ema.updates
        train(model)
        ema.update(model)
        accelerator.load_state(str(tmp_path))
        assert same(ema.tensors, expected) and ema.updates == updates
    finally:
        reset_accelerate()


def test_named_tensors_restart_from_the_model_and_no_others():
    model, ema = averaged()
    before = copy.deepcopy(ema.tensors)
    ema.reset(model, ["2.weight", "2.bias"])
    for name, value in model.state_dict().items():
        assert torch.equal(ema.tensors[name], value if name.startswith("2.") else before[name]), name
    assert ema.updates == 5


def test_a_tensor_that_is_not_there_cannot_restart():
    model, ema = averaged()
    with pytest.raises(ValueError, match="names: the model has no tensor 2.wieght"):
        ema.reset(model, ["2.wieght"])


def test_other_shapes_are_refused_until_the_average_begins_anew():
    model, ema = averaged()
    model[2] = nn.Linear(4, 3)
    with pytest.raises(ValueError, match=r"2.weight is \[2, 4\], the model's \[3, 4\].*Ema.reset\(model\)"):
        ema.update(model)
    with pytest.raises(ValueError, match="do not fit"):
        ema.copy_to(model)
    ema.reset(model)
    assert same(ema.tensors, state(model)) and ema.updates == 0


def test_a_refused_copy_changes_nothing():
    model, ema = averaged()
    model[2] = nn.Linear(4, 3)
    before = state(model)
    with pytest.raises(ValueError), ema.applied(model):
        pass
    assert same(state(model), before)


def test_turning_the_average_is_averaging_what_was_turned():
    """Rotated mid-run, the average is the one of a run that had the rotated basis from the start."""
    model = tiny_model(tiny_config(), kind=MRLReDimNetForXVector)
    turned = copy.deepcopy(model)
    embeddings = np.random.default_rng(0).normal(size=(60, 32))
    rotate(turned, embeddings)
    ema, expected = Ema(model, 0.9), Ema(turned, 0.9)
    for t in range(4):
        for each, average in ((model, ema), (turned, expected)):
            with torch.no_grad():
                for name, parameter in each.named_parameters():
                    if not name.startswith(("redimnet.projection.segments", "classifier")):
                        parameter += 0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(t))
            average.update(each)
    trained = state(model)
    ema.transform(model, lambda m: rotate(m, embeddings))
    assert same(state(model), trained)
    for name, value in expected.tensors.items():
        torch.testing.assert_close(ema.tensors[name], value, rtol=1e-5, atol=1e-5, msg=name)
    assert not torch.allclose(ema.tensors["classifier.weight"], trained["classifier.weight"], atol=1e-3)


def test_a_turned_average_scores_as_before_at_full_width():
    model = tiny_model(tiny_config(), kind=MRLReDimNetForXVector)
    ema = Ema(model, 0.9)
    crops = torch.stack(waves(6000, 6000, 6000))

    def cosines():
        with ema.applied(model), torch.inference_mode():
            unit = nn.functional.normalize(model(crops).embeddings, dim=1)
        return unit @ unit.T

    before = cosines()
    ema.transform(model, lambda m: rotate(m, np.random.default_rng(0).normal(size=(60, 32))))
    torch.testing.assert_close(cosines(), before, rtol=1e-4, atol=1e-5)


# ---------------------------------------------------------------- over the last evaluation points


def written(folder, keep: int, steps, resume_step: int = 0) -> tuple[LastWeights, dict[int, dict]]:
    last, states = LastWeights(folder, keep), {}
    model = small()
    for step in steps:
        train(model, seed=step)
        last.add(step, model, resume_step)
        states[step] = state(model)
    return last, states


@pytest.mark.parametrize("keep", [1, 2, 3, 9])
def test_the_mean_is_that_of_the_last_files(tmp_path, keep):
    last, states = written(tmp_path, keep, [10, 20, 30, 100])
    used = [10, 20, 30, 100][-keep:]
    model = small(seed=5)
    assert last.mean_into(model) == used
    for name, value in model.state_dict().items():
        if name == "1.num_batches_tracked":
            assert value == states[100][name] and value.dtype == torch.long
        else:
            expected = torch.from_numpy(np.mean([states[s][name].double().numpy() for s in used], axis=0))
            assert torch.equal(value, expected.float()), name


def test_the_mean_is_exact_where_float32_sums_are_not(tmp_path):
    last, model = LastWeights(tmp_path, 3), nn.Linear(1, 1, bias=False)
    for step, value in enumerate((1e8, 1.0, -1e8), start=1):
        model.weight.data.fill_(value)
        last.add(step, model, 0)
    last.mean_into(model)
    assert model.weight.item() == pytest.approx(1 / 3)


def test_files_of_before_a_rotation_can_be_left_out(tmp_path):
    last, states = written(tmp_path, 3, [10, 20, 30])
    model = small()
    assert last.mean_into(model, since=30) == [30] and same(state(model), states[30])


@pytest.mark.parametrize(("resumed", "expected"), [(0, []), (10, [10]), (25, [10, 20]), (99, [10, 20, 30])])
def test_files_after_the_step_of_a_resumed_run_are_dropped(tmp_path, resumed, expected):
    last, _ = written(tmp_path, 5, [10, 20, 30])
    (tmp_path / ".step-00000040.safetensors.writing").write_bytes(b"half")
    last.begin(resumed)
    assert last.steps == expected and len(list(tmp_path.iterdir())) == len(expected)


def test_a_run_may_begin_where_there_is_no_folder(tmp_path):
    last = LastWeights(tmp_path / "a" / "b", 2)
    last.begin(0)
    last.add(1, small(), 0)
    assert last.steps == [1]


@given(
    keep=st.integers(1, 4),
    checkpoint_every=st.integers(1, 7),
    killed=st.lists(st.integers(1, 16), max_size=3),
)
def test_stops_change_no_mean(tmp_path_factory, keep, checkpoint_every, killed):
    """At every evaluation point the files to average are those of a run that was never stopped."""
    last, model = LastWeights(tmp_path_factory.mktemp("run"), keep), nn.Linear(1, 1)

    def run(first: int, stop: int, checkpoint: int) -> int:
        for step in range(first + 1, stop + 1):
            last.add(step, model, checkpoint)
            assert last.steps[-keep:] == list(range(max(1, step - keep + 1), step + 1))
            assert len(last.steps) <= 2 * keep
            if step % checkpoint_every == 0:
                checkpoint = step
        return checkpoint

    checkpoint = 0
    for stop in [*killed, 17]:
        last.begin(checkpoint)
        checkpoint = run(checkpoint, stop, checkpoint)


def test_a_full_disk_leaves_the_files_that_were_there(tmp_path, monkeypatch):
    def full_disk(tensors, file):
        file.write_bytes(b"half")
        raise OSError("No space left on device")

    last, states = written(tmp_path, 2, [10, 20])
    with monkeypatch.context() as patch:
        patch.setattr(averaging, "save_file", full_disk)
        with pytest.raises(OSError, match="No space"):
            last.add(30, small(), 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"step-000000{s}.safetensors" for s in (10, 20)]
    model = small()
    assert last.mean_into(model) == [10, 20]
    last.add(30, model, 0)
    assert last.steps == [20, 30]


def test_nothing_to_average_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="holds no weights of step 0 or later"):
        LastWeights(tmp_path, 2).mean_into(small())
    last, _ = written(tmp_path, 2, [10])
    with pytest.raises(FileNotFoundError, match="step 11 or later"):
        last.mean_into(small(), since=11)


def test_files_of_another_model_are_refused_by_name(tmp_path):
    last, _ = written(tmp_path, 2, [10])
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 2), nn.Linear(2, 2))
    before = state(model)
    with pytest.raises(ValueError, match=r"step-00000010.safetensors: .* tensors do not fit") as error:
        last.mean_into(model)
    assert "0.weight is [4, 3], the model's [5, 3]" in str(error.value)
    assert same(state(model), before)
    with pytest.raises(ValueError, match="3.weight is missing"):
        last.mean_into(nn.Sequential(*small(), nn.Linear(2, 2)))
    with pytest.raises(ValueError, match="2.weight is not in the model"):
        last.mean_into(small()[:2])


def test_a_damaged_file_is_named(tmp_path):
    last, _ = written(tmp_path, 2, [10, 20])
    file = tmp_path / "step-00000010.safetensors"
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match=r"step-00000010.safetensors cannot be read"):
        last.mean_into(small())


def test_at_least_one_file_is_kept(tmp_path):
    with pytest.raises(ValueError, match="keep: got 0"):
        LastWeights(tmp_path, 0)


def test_other_files_in_the_folder_are_left_alone(tmp_path):
    (tmp_path / "notes.json").write_text(json.dumps({}))
    (tmp_path / "step-7.safetensors").write_bytes(b"another's")
    last, _ = written(tmp_path, 1, [10, 20])
    last.begin(0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.json", "step-7.safetensors"]


def test_a_whole_network_is_averaged_and_embeds(tmp_path):
    models = [tiny_model(tiny_config(), seed=seed, kind=MRLReDimNetForXVector) for seed in (0, 1)]
    last = LastWeights(tmp_path, 2)
    for step, model in enumerate(models, start=1):
        last.add(step, model, 0)
    mean = tiny_model(tiny_config(), seed=2, kind=MRLReDimNetForXVector)
    last.mean_into(mean)
    name = "redimnet.projection.norm.running_var"
    torch.testing.assert_close(mean.state_dict()[name], sum(m.state_dict()[name] for m in models) / 2)
    with torch.inference_mode():
        assert mean(torch.stack(waves(6000, 6000))).embeddings.isfinite().all()
