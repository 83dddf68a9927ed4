"""PLDA: that it finds the covariances it was made from, that its files and scores are what pyannote makes of them."""

import numpy as np
import pytest
from conftest import at_most, tiny_model
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import multivariate_normal

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.audio.io import AudioWarning
from mrl_redimnet.diarization.plda import PLDA, plda_of_speech
from mrl_redimnet.scoring.metrics import eer
from mrl_redimnet_cli import main

LAYOUT = "speaker/utterance"


def population(speakers: int = 200, each: int = 8, dim: int = 24, seed: int = 0, noise: float = 1.0):
    """Embeddings [N, D] of speakers who differ in some dimensions, with more noise in others; who speaks, [N]."""
    random = np.random.default_rng(seed)
    between, within = np.linspace(2, 0.1, dim), noise * np.linspace(0.3, 3, dim)
    turn = np.linalg.qr(np.random.default_rng(99).normal(size=(dim, dim)))[0]  # the same whatever the seed
    names = np.repeat([f"s{i}" for i in range(speakers)], each)
    means = np.repeat(random.normal(size=(speakers, dim)) * between, each, 0)
    return (means + random.normal(size=means.shape) * within) @ turn + 0.5, names


@pytest.fixture(scope="module")
def fitted() -> PLDA:
    return PLDA.fit(*population(), lda_dim=12, fingerprint="abc")


def trial_errors(scores: np.ndarray, names: np.ndarray) -> float:
    a, b = np.triu_indices(len(names), 1)
    return eer(scores[a, b], names[a] == names[b])


def test_speakers_it_never_saw_are_told_apart_better_than_by_cosine(fitted):
    x, names = population(speakers=40, seed=1)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert trial_errors(fitted.scores(x, x), names) < 0.7 * trial_errors(unit @ unit.T, names)


def test_in_its_own_space_one_speaker_has_covariance_one(fitted):
    """And the means of speakers psi, as closely as so many of them can show it."""
    x, names = population(speakers=1000, seed=2)
    latent = fitted.latent(x)
    means = np.array([latent[names == name].mean(0) for name in np.unique(names)])
    rest = latent - np.repeat([latent[names == name].mean(0) for name in dict.fromkeys(names)], 8, 0)
    np.testing.assert_allclose(rest.T @ rest / (len(x) - 1000), np.eye(12), atol=0.12)
    np.testing.assert_allclose(np.diag(np.cov(means.T)) - 1 / 8, fitted.psi, rtol=0.25, atol=0.1)
    assert (np.diff(fitted.psi) <= 0).all()


def test_a_score_is_a_ratio_of_likelihoods(fitted):
    """Of the two normal distributions of both embeddings together, written out."""
    x, _ = population(speakers=3, each=1, seed=3)
    latent, within, between = fitted.latent(x), np.eye(12), np.diag(fitted.psi)
    one = np.block([[within + between, between], [between, within + between]])
    scores = fitted.scores(x[:2], x)
    for a in range(2):
        for b in range(3):
            pair = np.concatenate([latent[a], latent[b]])
            two = sum(multivariate_normal.logpdf(latent[i], cov=within + between) for i in (a, b))
            assert scores[a, b] == pytest.approx(multivariate_normal.logpdf(pair, cov=one) - two)


@at_most(15)
@given(
    st.integers(0, 2**31),
    st.floats(0.01, 100),
    st.integers(2, 11),
    st.lists(st.integers(1, 9), min_size=12, max_size=30),
)
def test_any_units_and_any_numbers_of_utterances(seed, factor, lda_dim, counts):
    """Embeddings in other units have the same PLDA; as many utterances of each speaker as there are."""
    x, names = population(speakers=30, each=9, dim=16, seed=seed)
    rows = np.concatenate([9 * speaker + np.arange(count) for speaker, count in enumerate(counts)])
    if len(rows) - len(counts) < 2 * lda_dim:
        with pytest.raises(ValueError, match=f"{len(rows)} pieces of {len(counts)} speakers are too few"):
            PLDA.fit(x[rows], names[rows], lda_dim)
        return
    plda, scaled = (PLDA.fit(scale * x[rows], names[rows], lda_dim) for scale in (1, factor))
    assert plda.lda.shape == (16, lda_dim) and (plda.psi > 0).all()
    np.testing.assert_allclose(scaled.scores(factor * x, factor * x), plda.scores(x, x), rtol=1e-4, atol=1e-3)


def test_the_likeliest_covariances_beat_their_neighbours():
    """The marginal likelihood of speakers' embeddings, written out, falls with every small change of the model."""
    x, names = population(speakers=30, each=4, dim=6)
    plda = PLDA.fit(x, names, lda_dim=3)
    back = np.linalg.inv(plda.tr)
    vectors = plda.latent(x) @ back.T + plda.mu

    def likelihood(mu, between, within) -> float:
        cov = np.kron(np.ones((4, 4)), between) + np.kron(np.eye(4), within)
        rows = (vectors - mu).reshape(30, 12)
        return float(multivariate_normal.logpdf(rows, cov=cov).sum())

    between, within = (back * plda.psi) @ back.T, back @ back.T
    best = likelihood(plda.mu, between, within)
    random = np.random.default_rng(0)
    for _ in range(20):
        step = random.normal(size=(3, 3)) * 0.05
        other = (np.eye(3) + step) @ between @ (np.eye(3) + step).T
        assert likelihood(plda.mu, other, within) < best + 0.02
        other = (np.eye(3) + step) @ within @ (np.eye(3) + step).T
        assert likelihood(plda.mu, between, other) < best + 0.02
        assert likelihood(plda.mu + step[0], between, within) < best + 0.02


def test_saved_and_loaded(fitted, tmp_path):
    fitted.save(tmp_path / "plda")
    loaded = PLDA.load(tmp_path / "plda")
    x, _ = population(speakers=4)
    np.testing.assert_allclose(loaded.scores(x, x), fitted.scores(x, x), rtol=1e-9)
    assert loaded.fingerprint == "abc"
    assert sorted(file.name for file in (tmp_path / "plda").iterdir()) == ["plda.npz", "xvec_transform.npz"]


@pytest.mark.parametrize(
    ("spoil", "error", "message"),
    [
        (lambda folder: (folder / "plda.npz").unlink(), FileNotFoundError, "plda.npz is missing"),
        (lambda folder: (folder / "plda.npz").write_bytes(b"nothing"), ValueError, "not a file of arrays"),
        (lambda folder: (folder / "plda.npz").write_bytes(b""), ValueError, "not a file of arrays"),
        (lambda folder: np.savez(folder / "plda.npz", mu=1), ValueError, "as tr, psi is missing"),
    ],
)
def test_what_is_no_plda(fitted, tmp_path, spoil, error, message):
    fitted.save(tmp_path / "plda")
    spoil(tmp_path / "plda")
    with pytest.raises(error, match=message):
        PLDA.load(tmp_path / "plda")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x, names: (x[0], names, 2), r"expected finite embeddings \[N, D\] and N speakers"),
        (lambda x, names: (x, names[1:], 2), r"got shapes \(80, 24\) and \(79,\)"),
        (lambda x, names: (np.where(x > 2, np.nan, x), names, 2), "finite"),
        (lambda x, names: (x, names, 10), "lda_dim 10 for 10 speakers and 24 numbers, expected 2 to one less"),
        (lambda x, names: (x, names, 0), "lda_dim 0"),
        (lambda x, names: (x, ["me"] * len(x), None), "lda_dim 0 for 1 speakers"),
        (lambda x, names: (x[::8], names[::8], 3), "10 pieces of 10 speakers are too few for 3 dimensions"),
    ],
)
def test_what_no_plda_can_be_made_of(change, message):
    with pytest.raises(ValueError, match=message):
        PLDA.fit(*change(*population(speakers=10)))


# ---------------------------------------------------------------- of speech


def test_of_speech(speech, tmp_path):
    """Recordings are cut; what cannot be read is told; the first numbers of the embeddings have a PLDA of their own."""
    encoder = SpeakerEncoder(tiny_model())
    plda, found = plda_of_speech(encoder, speech / "wav", layout=LAYOUT, seconds=0.1, lda_dim=4)
    assert (found.speakers, found.files) == (8, 32) and found.pieces > 64
    assert plda.lda.shape == (32, 4) and plda.fingerprint == encoder.fingerprint
    short, _ = plda_of_speech(encoder, speech / "wav", dim=8, lda_dim=4, layout=LAYOUT, seconds=0.1)
    assert short.lda.shape == (8, 4)


def test_of_speech_with_broken_files(speech, tmp_path):
    root = tmp_path / "wav"
    for file in (speech / "wav").rglob("*.wav"):
        (root / file.relative_to(speech / "wav")).parent.mkdir(parents=True, exist_ok=True)
        (root / file.relative_to(speech / "wav")).write_bytes(file.read_bytes())
    broken = next(root.rglob("*.wav"))
    broken.write_bytes(b"RIFF")
    with pytest.warns(AudioWarning, match=rf"1 of 32 files cannot be used: .*{broken.name}"):
        _, found = plda_of_speech(SpeakerEncoder(tiny_model()), root, layout=LAYOUT, seconds=0.1, lda_dim=2)
    assert found.files == 31


def test_the_command(speech, folder, tmp_path, capsys):
    out = tmp_path / "plda"
    line = [
        "plda",
        str(folder),
        str(speech / "wav"),
        "--out",
        str(out),
        "--seconds",
        "0.1",
        "--dim",
        "16",
        "--layout",
        LAYOUT,
    ]
    assert main([*line, "--lda-dim", "3"]) == 0
    assert "PLDA of 16 numbers in 3 dimensions" in capsys.readouterr().out
    assert PLDA.load(out).lda.shape == (16, 3)
    assert main([*line, "--lda-dim", "3"]) == 2 and "exists already" in capsys.readouterr().err
    line[4] = str(tmp_path / "other")
    assert main([*line, "--lda-dim", "8"]) == 2
    assert "lda_dim 8 for 8 speakers" in capsys.readouterr().err and not (tmp_path / "other").exists()
