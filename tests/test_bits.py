"""What benchmarks/bits.py compares: codes, the rotations for them, and the gradient through signs."""

import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
import bits
from paired import Drawn

sys.path.pop(0)
DIMS = [8, 16, 40]


def embeddings(seed: int, count: int = 30) -> np.ndarray:
    """Numbers of falling size, as in principal axes."""
    return np.random.default_rng(seed).standard_normal((count, DIMS[-1])) * 0.95 ** np.arange(DIMS[-1])


def cosines(rows: np.ndarray) -> np.ndarray:
    return bits.units(rows) @ bits.units(rows).T


@given(seed=st.integers(0, 999))
def test_a_rotation_within_segments_changes_no_cosine_of_a_prefix(seed):
    rows = embeddings(seed)
    turned = rows @ bits.within_segments(DIMS, lambda start, end: bits.random_rotation(end - start, seed))
    for dim in DIMS:
        np.testing.assert_allclose(cosines(turned[:, :dim]), cosines(rows[:, :dim]), atol=1e-5)


def test_a_turned_projection_gives_turned_embeddings():
    rng = np.random.default_rng(0)
    plain = bits.Projection(rng.standard_normal((DIMS[-1], 12)), rng.standard_normal(DIMS[-1]))
    basis, statistics = bits.random_rotation(DIMS[-1], 1), rng.standard_normal((5, 12))
    np.testing.assert_allclose(plain.turned(basis)(statistics), plain(statistics) @ basis)


def test_itq_is_a_rotation_that_brings_rows_nearer_to_their_signs():
    rows = bits.units(embeddings(0, 400))
    turn = bits.iterative_quantisation(rows)
    np.testing.assert_allclose(turn.T @ turn, np.eye(DIMS[-1]), atol=1e-4)

    def loss(some: np.ndarray) -> float:
        return float(np.square(np.sign(some) / np.sqrt(some.shape[1]) - some).sum())

    others = [loss(rows), *(loss(rows @ bits.random_rotation(DIMS[-1], seed)) for seed in range(5))]
    assert loss(rows @ turn) < min(others)


@given(seed=st.integers(0, 999), dim=st.sampled_from(DIMS))
def test_packed_signs_of_a_prefix_begin_those_of_the_whole_and_their_distance_is_the_cosine(seed, dim):
    rows = embeddings(seed, 6)
    packed = np.packbits(rows > 0, axis=1)[:, : dim // 8]
    np.testing.assert_array_equal(packed, np.packbits(rows[:, :dim] > 0, axis=1))
    differ = np.unpackbits(packed[:, None] ^ packed[None], axis=2).sum(axis=2, dtype=int)
    stored, asked = bits.signs(rows)(rows[:, :dim])
    assert stored is asked
    np.testing.assert_allclose(cosines(stored), 1 - 2 * differ / dim, atol=1e-12)


@pytest.mark.parametrize("count", [1, 2, 4, 8])
def test_levels_are_as_many_as_the_bits_allow_and_the_step_is_the_best(count):
    numbers = np.random.default_rng(0).standard_normal(20_000)
    step = bits.best_step(count)

    def error(of: float) -> float:
        return float(np.mean((numbers - bits.levels(numbers, count, of)) ** 2))

    found = np.unique(bits.levels(numbers, count, step))
    assert len(found) <= 2**count and np.abs(found).max() <= step * (2**count - 1) / 2 + 1e-12
    assert error(step) < min(error(0.8 * step), error(1.25 * step))


def test_more_bits_are_nearer_to_the_cosines():
    rows = embeddings(1, 200)
    errors = []
    for codec in (bits.signs, bits.uniform(2), bits.uniform(4), bits.int8_by_range, bits.float32):
        stored, _ = codec(rows)(rows)
        errors.append(float(np.abs(cosines(stored) - cosines(rows)).mean()))
    assert errors == sorted(errors, reverse=True) and errors[-1] == 0 and errors[-2] < 0.01


def test_the_gradient_goes_straight_through_signs_within_the_spread():
    numbers = torch.tensor([[0.5, -3.0], [-1.0, 0.1], [1.0, 0.1]], requires_grad=True)
    found = bits.straight_through(numbers)
    assert found.tolist() == [[1, -1], [-1, 1], [1, 1]]
    found.sum().backward()
    spread = numbers.detach().square().mean(0).sqrt()
    expected = torch.where(numbers.detach().abs() <= spread, 1 / spread, 0.0)
    torch.testing.assert_close(numbers.grad, expected)


def test_training_moves_the_cosines_of_signs_towards_the_teachers():
    rng = np.random.default_rng(0)
    config = type("Config", (), {"matryoshka_dims": DIMS})
    statistics = rng.standard_normal((120, 24)).astype(np.float32)
    plain = bits.Projection(*(rng.standard_normal(shape).astype(np.float32) for shape in ((DIMS[-1], 24), DIMS[-1])))
    training = bits.Training(statistics, np.repeat(np.arange(40), 3))
    recipe, model = bits.Recipe(float_share=0, learning_rate=5e-3), type("Model", (), {"config": config})
    learnt = bits.trained(plain, training, model, recipe, 0, plain(statistics))

    def error(projection: bits.Projection) -> float:
        return float(np.square(cosines(np.sign(projection(statistics))) - cosines(plain(statistics))).mean())

    assert error(learnt) < 0.9 * error(plain)


def test_bytes_and_rates_come_into_the_page(tmp_path):
    drawn = Drawn(0.1, np.array([0.08, 0.12]))
    rates = {(title, name, dim): drawn for title in ("development", "other") for name in bits.DRAWN for dim in DIMS}
    record = {
        "command": "python",
        "machine": "a machine",
        "resamples": 2,
        "seeds": 1,
        "training": {"utterances": 3, "speakers": 2},
        "lists": {"development": 10, "other": 20},
        "dims": DIMS,
        "bytes_per_number": dict.fromkeys(bits.DRAWN, 0.5),
        "rates": [bits.row(key, value, rates) for key, value in rates.items()],
    }
    bits.report(record, tmp_path / "page")
    text = (tmp_path / "page.md").read_text()
    assert "| 4 bits | 4 B: 10.00 [8.1, 11.9] | 8 B" in text and "## other, 20 trials" in text
    assert (tmp_path / "page.png").stat().st_size > 10_000
