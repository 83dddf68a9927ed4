"""Probabilistic linear discriminant analysis (PLDA) of embeddings: how they vary between speakers, and within one.

    plda, summary = plda_of_speech(encoder, "SPEECH")          # a corpus whose folders name speakers
    plda.save("PLDA")                                          # the two files that pyannote.audio 4 reads for VBx

Embeddings of diarisation are of short pieces of speech, so recordings are cut into pieces before.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import ArrayLike, NDArray
from tqdm import tqdm

from mrl_redimnet.audio.io import AudioError, AudioWarning
from mrl_redimnet.data.corpus import DEFAULT_LAYOUT, audio_source, blocks_of, load_corpus, split_usable
from mrl_redimnet.encoder import SpeakerEncoder, problems_text
from mrl_redimnet.extras import extra
from mrl_redimnet.files import replace_folder

TRANSFORM_FILE, PLDA_FILE = "xvec_transform.npz", "plda.npz"
LDA_DIM = 128  # of pyannote's own PLDA, and the most that it uses of one
PIECE_SECONDS = 3.0
FILES_PER_SPEAKER, PIECES_PER_SPEAKER = 10, 20  # drawn of more, so that no speaker outweighs the others
ROUNDS = 20  # of expectation-maximisation: more change no score by a thousandth
LEAST = 1e-6  # of a variance between speakers, beside 1 within one: its inverse must be finite


@dataclass(frozen=True)
class PLDA:
    """Embeddings [N, D], centred, made unit vectors, projected by LDA to [N, d], centred, made unit vectors again, and
    then a two-covariance model of them. Its arrays are named as in pyannote's files.

    Attributes:
        mean1: [D] of embeddings.
        lda: [D, d] linear discriminants.
        mean2: [d] of what they give.
        mu: [d] mean of speakers.
        tr: [d, d] takes vectors (as columns) to where the covariance within speakers is 1, and between them diagonal.
        psi: [d] that diagonal, largest first.
        fingerprint: names the weights whose embeddings these are, as `SpeakerEncoder.fingerprint`.
    """

    mean1: NDArray
    lda: NDArray
    mean2: NDArray
    mu: NDArray
    tr: NDArray
    psi: NDArray
    fingerprint: str = ""

    @classmethod
    def fit(
        cls, embeddings: ArrayLike, speakers: Sequence, lda_dim: int | None = None, fingerprint: str = ""
    ) -> "PLDA":
        """Of embeddings [N, D] and the speaker of each [N].

        The discriminants are Fisher's, with the covariance within speakers shrunk as Ledoit and Wolf (2004) found best;
        the two covariances are the likeliest ones, by expectation-maximisation ("The speaker partitioning problem",
        Brümmer and de Villiers, Odyssey 2010; "Unifying probabilistic linear discriminant analysis variants in
        biometric authentication", Sizov, Lee and Kinnunen, S+SSPR 2014).

        lda_dim: d; by default `LDA_DIM`, or less where there are no more numbers or speakers.

        Raises ValueError for embeddings that are not finite, d above D or the number of speakers less one, or too few
        utterances; ModuleNotFoundError without the extra diarization.
        """
        x = np.asarray(embeddings, dtype=np.float64)
        names, labels = np.unique(np.asarray(speakers), return_inverse=True)
        if x.ndim != 2 or labels.shape != (len(x),) or not np.isfinite(x).all():
            raise ValueError(
                f"PLDA: expected finite embeddings [N, D] and N speakers, got shapes {x.shape} and {labels.shape}."
            )
        most = min(x.shape[1], len(names) - 1)
        d = min(LDA_DIM, most) if lda_dim is None else lda_dim
        if not 2 <= d <= most:  # a unit vector of one number is only a sign
            raise ValueError(
                f"PLDA: got lda_dim {d} for {len(names)} speakers and {x.shape[1]} numbers, expected 2 to one less "
                "than the speakers, and no more than the numbers."
            )
        if len(x) - len(names) < 2 * d:
            raise ValueError(
                f"PLDA: {len(x)} pieces of {len(names)} speakers are too few for {d} dimensions: give at least "
                f"{2 * d + len(names)}, or fewer dimensions."
            )
        mean1 = x.mean(0)
        units = _long_units(x - mean1)
        lda = _discriminants(units, labels, d)
        projected = units @ lda
        mean2 = projected.mean(0)
        mu, between, within = _two_covariances(_long_units(projected - mean2), labels)
        psi, turn = _jointly_diagonal(between, within)
        return cls(mean1, lda, mean2, mu, turn.T, psi.clip(min=LEAST), fingerprint)

    def latent(self, embeddings: ArrayLike) -> NDArray:
        """Embeddings [N, D] -> [N, d]: of one speaker with covariance 1, of speakers' means with covariance psi."""
        x = np.asarray(embeddings, dtype=np.float64)
        return (_long_units(_long_units(x - self.mean1) @ self.lda - self.mean2) - self.mu) @ self.tr.T

    def scores(self, a: ArrayLike, b: ArrayLike) -> NDArray:
        """Log-likelihood ratios, one speaker to two, of embeddings a [N, D] and b [M, D] -> [N, M]."""
        a, b = self.latent(a), self.latent(b)
        total = 1 + self.psi
        determinant = total**2 - self.psi**2  # of both embeddings' covariance, a dimension at a time
        own, cross = 1 / total - total / determinant, self.psi / determinant
        squares = [0.5 * (x**2 * own).sum(1) for x in (a, b)]
        return 0.5 * np.log(total**2 / determinant).sum() + squares[0][:, None] + squares[1] + (a * cross) @ b.T

    def save(self, folder: str | Path) -> None:
        """Writes the folder, whole or not at all, as pyannote's `PLDA.from_pretrained` reads it."""

        def write(target: Path) -> None:
            np.savez(target / TRANSFORM_FILE, mean1=self.mean1, mean2=self.mean2, lda=self.lda)
            np.savez(target / PLDA_FILE, mu=self.mu, tr=self.tr, psi=self.psi, fingerprint=self.fingerprint)

        replace_folder(Path(folder), write)

    @classmethod
    def load(cls, folder: str | Path) -> "PLDA":
        """What `save`, or somebody else for pyannote, has written.

        Raises FileNotFoundError where a file is missing, ValueError for files that are something else.
        """
        parts: dict[str, NDArray] = {}
        for name in (TRANSFORM_FILE, PLDA_FILE):
            file = Path(folder) / name
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing: give a folder that `mrl-redimnet plda` has written.")
            try:
                with np.load(file, allow_pickle=False) as stored:
                    parts |= {key: stored[key] for key in stored.files}
            except (ValueError, OSError, EOFError) as error:  # numpy has no error of its own for a broken file
                raise ValueError(
                    f"{file}: not a file of arrays, as `mrl-redimnet plda` writes it ({error})."
                ) from error
        keys = ("mean1", "lda", "mean2", "mu", "tr", "psi")
        if missing := [key for key in keys if key not in parts]:
            raise ValueError(f"{folder}: no PLDA, as {', '.join(missing)} is missing.")
        mean1, lda, mean2, mu, tr, psi = (parts[key] for key in keys)
        return cls(mean1, lda, mean2, mu, tr, psi, str(parts.get("fingerprint", "")))


@dataclass(frozen=True)
class SpeechSummary:
    """Of how many `speakers`, `files` and `pieces` a PLDA was made."""

    speakers: int
    files: int
    pieces: int


def plda_of_speech(
    encoder: SpeakerEncoder,
    speech: str | Path,
    dim: int | None = None,
    lda_dim: int | None = None,
    *,
    layout: str = DEFAULT_LAYOUT,
    seconds: float = PIECE_SECONDS,
    progress: str | None = None,
) -> tuple[PLDA, SpeechSummary]:
    """A PLDA of the embeddings of a labelled corpus's recordings, cut into pieces.

    Of each speaker up to `FILES_PER_SPEAKER` files are drawn, and up to `PIECES_PER_SPEAKER` pieces of these; an
    AudioWarning lists files that cannot be used.

    Args:
        encoder: makes the embeddings.
        speech: a folder or data set, as of `mrl_redimnet.data.corpus.load_corpus`. layout: of the folder.
        dim: how many numbers of each embedding [all].
        lda_dim: as of `PLDA.fit`.
        seconds: of a piece. A shorter recording is one piece; one of less than a third of it is not used.
        progress: title of a progress bar on a terminal.

    Raises:
        FileNotFoundError: there is no such speech. AudioError: none of it can be used.
        ValueError: what `PLDA.fit`, `load_corpus` and `SpeakerEncoder.embed_windows` find wrong.
    """
    dim = encoder.dim(dim)
    rows, unusable = split_usable(load_corpus(speech, layout), seconds / 3)
    problems = [f"{path} ({reason})" for path, reason in unusable]
    by_speaker: dict[str, list[int]] = {}
    for row, speaker in enumerate(name for block in blocks_of(rows, "speaker") for name in block.to_pylist()):
        by_speaker.setdefault(speaker, []).append(row)
    random, files = np.random.default_rng(0), 0
    embeddings: list[NDArray] = []
    speakers: list[str] = []
    hidden = True if progress is None else None
    for speaker, own in tqdm(sorted(by_speaker.items()), desc=progress, disable=hidden, leave=False, unit=" speakers"):
        pieces: list[NDArray] = []
        for at in _drawn(random, len(own), FILES_PER_SPEAKER):
            try:
                pieces += [*encoder.embed_windows(audio_source(rows, own[at]), seconds, seconds, dim)[1]]
                files += 1
            except AudioError as error:
                problems.append(str(error))
        embeddings += [pieces[at] for at in _drawn(random, len(pieces), PIECES_PER_SPEAKER)]
        speakers += [speaker] * (len(embeddings) - len(speakers))
    if problems:
        message = f"{speech}: {problems_text(dict(enumerate(problems)), len(problems) + files)}"
        if not embeddings:
            raise AudioError(message)
        warnings.warn(f"{message}. The others are used", AudioWarning, stacklevel=2)
    plda = PLDA.fit(np.array(embeddings), speakers, lda_dim, encoder.fingerprint)
    return plda, SpeechSummary(len(set(speakers)), files, len(speakers))


def _drawn(random: np.random.Generator, count: int, most: int) -> list[int]:
    """All of `count` rows, or `most` of them, in order."""
    return sorted(random.permutation(count)[:most].tolist())


def _long_units(x: NDArray) -> NDArray:
    """x [N, D] -> vectors of length sqrt(D), so that a number of them is around 1."""
    return np.sqrt(x.shape[1]) * x / np.linalg.norm(x, axis=1, keepdims=True)


def _grouped(x: NDArray, labels: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """x [N, d], labels [N] from 0 to K - 1 -> how many each has [K], their means [K, d], the rest of x [N, d]."""
    counts = np.bincount(labels)
    means = np.zeros((len(counts), x.shape[1]))
    np.add.at(means, labels, x)
    means /= counts[:, None]
    return counts, means, x - means[labels]


def _discriminants(x: NDArray, labels: NDArray, d: int) -> NDArray:
    """The d directions [D, d] in which speakers differ most, beside how one speaker's utterances do."""
    with extra("diarization"):
        from sklearn.covariance import ledoit_wolf

    counts, means, rest = _grouped(x, labels)
    within, _ = ledoit_wolf(rest, assume_centered=True)
    away = means - x.mean(0)
    _, turn = _jointly_diagonal((counts[:, None] * away).T @ away / len(x), within)
    return turn[:, :d]


def _jointly_diagonal(between: NDArray, within: NDArray) -> tuple[NDArray, NDArray]:
    """Two covariances [d, d] -> psi [d], largest first, and V [d, d] with V'WV = 1 and V'BV = diag(psi)."""
    with extra("diarization"):
        from scipy.linalg import eigh

    values, vectors = eigh(between, within)
    return values[::-1], vectors[:, ::-1]


def _two_covariances(x: NDArray, labels: NDArray) -> tuple[NDArray, NDArray, NDArray]:
    """x [N, d] of speakers -> the likeliest mean of speakers [d], covariance between speakers and within one [d, d].

    Where both covariances are diagonal, each number of a speaker's mean y has a posterior of its own: with m the mean
    of n utterances, n psi / (n psi + 1) of the way from the mean of all to m, with variance psi / (n psi + 1).
    """
    counts, means, rest = _grouped(x, labels)
    n, scatter, mu = counts[:, None], rest.T @ rest, x.mean(0)
    within, between = scatter / (len(x) - len(counts)), np.cov(means.T, ddof=0)
    for _ in range(ROUNDS):
        psi, turn = _jointly_diagonal(between, within)
        psi, back = psi.clip(min=LEAST), np.linalg.inv(turn)
        spread = psi / (n * psi + 1)  # [K, d]
        m = (means - mu) @ turn
        y = n * spread * m
        centre = y.mean(0)
        between = back.T @ ((y - centre).T @ (y - centre) / len(y) + np.diag(spread.mean(0))) @ back
        left = (n * (m - y)).T @ (m - y) + np.diag((n * spread).sum(0))
        within = (scatter + back.T @ left @ back) / len(x)
        mu = mu + centre @ back
    return mu, between, within
