"""The rotation: nothing changes at full width, and every prefix keeps all the energy that as many numbers can."""

import numpy as np
import pytest
import torch
from conftest import tiny_config, tiny_model, waves
from hypothesis import given
from hypothesis import strategies as st
from no_gpu import without_float64

from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet import rotation
from mrl_redimnet.rotation import principal_rotation, rotate

BATCH = torch.stack(waves(*[4000] * 48))
KINDS = [MRLReDimNetModel, MRLReDimNetForXVector, MRLReDimNetForSequenceClassification]


def embeddings_of(model) -> np.ndarray:
    with torch.inference_mode():
        return model(BATCH).embeddings.numpy()


def unit(embeddings: np.ndarray) -> np.ndarray:
    embeddings = embeddings.astype(np.float64)
    return embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)


def prefix_energies(embeddings: np.ndarray) -> np.ndarray:
    """Mean energy of the first 1, 2, ... D numbers of length-normalised embeddings."""
    return np.cumsum((unit(embeddings) ** 2).mean(0))


# ---------------------------------------------------------------- the rotation itself

SHAPES = dict(seed=st.integers(0, 10**6), count=st.integers(2, 40), width=st.integers(1, 16))


def draw(seed: int, count: int, width: int) -> np.ndarray:
    """Embeddings whose directions are far from equally strong."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((count, width)) @ rng.standard_normal((width, width)) + rng.standard_normal(width)


@given(**SHAPES)
def test_it_is_orthogonal_and_its_energies_fall(seed, count, width):
    turn, energies = principal_rotation(draw(seed, count, width))
    assert np.allclose(turn.T @ turn, np.eye(width), atol=1e-10)
    assert (energies >= 0).all() and (np.diff(energies) <= 1e-12).all()
    assert energies.sum() == pytest.approx(1.0)


@given(**SHAPES)
def test_a_prefix_holds_the_largest_eigenvalues(seed, count, width):
    embeddings = draw(seed, count, width)
    turn, _ = principal_rotation(embeddings)
    second_moment = unit(embeddings).T @ unit(embeddings) / count
    expected = np.cumsum(np.sort(np.linalg.eigvalsh(second_moment))[::-1])
    assert np.allclose(prefix_energies(embeddings @ turn), expected, atol=1e-9)


@given(**SHAPES)
def test_no_other_basis_keeps_more(seed, count, width):
    embeddings = draw(seed, count, width)
    turn, _ = principal_rotation(embeddings)
    other, _ = np.linalg.qr(np.random.default_rng(seed + 1).standard_normal((width, width)))
    assert (prefix_energies(embeddings @ turn) >= prefix_energies(embeddings @ other) - 1e-9).all()


@given(**SHAPES)
def test_length_does_not_count(seed, count, width):
    embeddings = draw(seed, count, width)
    lengths = np.random.default_rng(seed).uniform(0.1, 10, (count, 1))
    assert np.allclose(principal_rotation(embeddings)[1], principal_rotation(embeddings * lengths)[1], atol=1e-9)


@pytest.mark.parametrize("shape", [(8,), (1, 8), (0, 8), (2, 2, 8)])
def test_it_needs_two_embeddings(shape):
    with pytest.raises(ValueError, match="at least two embeddings"):
        principal_rotation(np.ones(shape))


@pytest.mark.parametrize("value", [0.0, np.nan, np.inf])
def test_it_needs_embeddings_with_a_direction(value):
    embeddings = np.ones((4, 8))
    embeddings[2] = value
    with pytest.raises(ValueError, match="finite embeddings that are not zero"):
        principal_rotation(embeddings)


# ---------------------------------------------------------------- folded into a model


@pytest.mark.parametrize(
    ("variant", "seed", "kind"),
    [
        *(("convnext_convatt", 0, kind) for kind in KINDS),
        *((variant, 1, MRLReDimNetForXVector) for variant in ("tstp_embedding_norm", "tap", "redimnet2_normed")),
        ("tstp_embedding_norm", 0, MRLReDimNetForSequenceClassification),
    ],
)
def test_full_width_answers_as_before(variant, seed, kind):
    model = tiny_model(tiny_config(variant), seed, kind)
    with torch.inference_mode():
        before = model(BATCH)
    rotate(model, embeddings_of(model))
    with torch.inference_mode():
        after = model(BATCH)
    cosines = [unit(answer.embeddings.numpy()) @ unit(answer.embeddings.numpy()).T for answer in (before, after)]
    assert np.abs(cosines[0] - cosines[1]).max() < 1e-5
    assert not torch.allclose(before.embeddings, after.embeddings, atol=0.01)  # and yet it was rotated
    if kind is not MRLReDimNetModel:
        assert torch.allclose(before.logits, after.logits, atol=3e-4)


@pytest.mark.parametrize("variant", ["convnext_convatt", "tstp_embedding_norm", "redimnet2_normed"])
def test_every_prefix_is_a_principal_subspace(variant):
    model = tiny_model(tiny_config(variant))
    before = embeddings_of(model)
    rotate(model, before)
    second_moment = unit(before).T @ unit(before) / len(before)
    expected = np.cumsum(np.linalg.eigvalsh(second_moment)[::-1])
    assert np.allclose(prefix_energies(embeddings_of(model)), expected, atol=1e-5)


def test_energies_are_those_of_the_rotated_prefixes():
    model = tiny_model()
    kept = rotate(model, embeddings_of(model))
    assert kept.shape == (32,)
    assert (np.diff(kept) >= 0).all() and kept[-1] == pytest.approx(1.0)
    assert np.allclose(kept, prefix_energies(embeddings_of(model)), atol=1e-5)


def test_a_prefix_that_is_computed_alone_is_rotated_too():
    model = tiny_model()
    rotate(model, embeddings_of(model))
    with torch.inference_mode():
        short = model(BATCH, truncate_dim=8).embeddings.numpy()
    assert np.allclose(short, embeddings_of(model)[:, :8], atol=1e-5)


def test_a_second_rotation_changes_nothing():
    model = tiny_model()
    rotate(model, embeddings_of(model))
    once = embeddings_of(model)
    rotate(model, once)
    # Eigenvectors are known up to their sign, and weak ones less well.
    assert np.allclose(np.abs(embeddings_of(model)[:, :8]), np.abs(once[:, :8]), atol=1e-3)


def test_only_projection_and_classifier_change():
    model = tiny_model(kind=MRLReDimNetForXVector)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    rotate(model, embeddings_of(model))
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    segments = {f"redimnet.projection.segments.{i}.{kind}" for i in range(3) for kind in ("weight", "bias")}
    assert changed == segments | {"classifier.weight"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rotated_model_is_an_ordinary_one(tmp_path, kind):
    """Also where a norm behind the projection was folded in: the saved configuration has none."""
    model = tiny_model(tiny_config("tstp_embedding_norm"), kind=kind)
    rotate(model, embeddings_of(model))
    assert model.config.embedding_norm is False
    model.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path).eval()
    assert not any("embedding_norm" in name for name in loaded.state_dict())
    assert np.array_equal(embeddings_of(loaded), embeddings_of(model))


@pytest.mark.parametrize("shape", [(48, 31), (48, 33), (32,), (48, 32, 1), ()])
def test_embeddings_of_another_width_are_refused(shape):
    model = tiny_model()
    with pytest.raises(ValueError, match="full width 32"):
        rotate(model, np.ones(shape))


@pytest.mark.parametrize("value", [0.0, np.nan])
def test_a_refused_rotation_leaves_the_model_alone(value):
    model = tiny_model(tiny_config("tstp_embedding_norm"))
    before = embeddings_of(model)
    broken = before.copy()
    broken[3] = value
    with pytest.raises(ValueError, match="finite embeddings that are not zero"):
        rotate(model, broken)
    assert np.array_equal(embeddings_of(model), before)


def test_a_model_is_rotated_on_a_device_without_float64():
    model = tiny_model(tiny_config("tstp_embedding_norm"), kind=MRLReDimNetForXVector)
    before = embeddings_of(model)
    expected = tiny_model(tiny_config("tstp_embedding_norm"), kind=MRLReDimNetForXVector)
    rotate(expected, before)
    rotate(without_float64(model), before)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name].as_subclass(torch.Tensor), tensor), name


def test_every_process_takes_the_rotation_of_the_first(monkeypatch):
    """Signs of eigenvectors are anybody's choice."""
    model, other = tiny_model(), tiny_model()
    before = embeddings_of(model)
    rotate(model, before)
    monkeypatch.setattr(rotation, "broadcast_object_list", lambda parts: [-parts[0], *parts[1:]])
    rotate(other, before)
    assert np.allclose(embeddings_of(other), -embeddings_of(model), atol=1e-6)
