"""A small synthetic multi-speaker corpus in VoxCeleb's folder layout, made from a seed alone.

Source-filter synthesis: a Rosenberg (1971) glottal pulse train with the first-order spectral tilt of the LF (Fant,
Liljencrants & Lin, 1985) return phase, jitter, shimmer and breath noise, through a cascade of Klatt (1980) resonators
that follow vowel targets from Peterson & Barney (1952), with fricative noise, stop gaps and bursts. It exercises a
training and scoring pipeline; it says nothing about real voices.
"""

import csv
import json
import os
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import soundfile

from configuration_mrl_redimnet import SAMPLING_RATE
from mrl_redimnet.extras import extra
from mrl_redimnet.streams import SyntheticStream

with extra("evaluation"):
    from scipy.signal import lfilter

GENERATOR_VERSION = 1  # raise whenever the same parameters would give other samples, so that old corpora are not reused
FIRST_TEST_SPEAKER = 10001  # id0xxxx are training speakers, id1xxxx test speakers
MAX_TRIALS = 1500

_HOP = 160  # one control frame, 10 ms
_FFT = 1024  # a 20 ms frame and 44 ms for the resonators to ring out
_UPPER = (3350.0, 4300.0, 5300.0, 6300.0)  # F4.. of an average male tract, Hz

# Columns: F1, F2, F3 (Hz, male), voice level, noise level, noise centre and bandwidth (Hz), shortest and longest (ms).
# Vowels: Peterson & Barney (1952), table II, men. Consonant formants: approximately Klatt's (1980, table III); the
# nasals' F1 is lowered for want of a nasal pole. Levels, noise and durations are rough choices of ours.
_VOWELS = np.array(
    [[*row, 1.0, 0.0, 3000, 2000, 70, 190] for row in (
        (270, 2290, 3010), (390, 1990, 2550), (530, 1840, 2480), (660, 1720, 2410), (730, 1090, 2440),
        (570, 840, 2410), (440, 1020, 2240), (300, 870, 2240), (640, 1190, 2390), (490, 1350, 1690),
    )]
)  # fmt: skip
_CONSONANTS = np.array(
    [
        [290, 610, 2150, 0.50, 0.00, 3000, 2000, 50, 90],  # w
        [260, 2070, 3020, 0.50, 0.00, 3000, 2000, 50, 90],  # j
        [310, 1060, 1380, 0.50, 0.00, 3000, 2000, 50, 90],  # r
        [310, 1050, 2880, 0.50, 0.00, 3000, 2000, 50, 90],  # l
        [270, 1270, 2130, 0.35, 0.00, 3000, 2000, 50, 90],  # m
        [270, 1340, 2470, 0.35, 0.00, 3000, 2000, 50, 90],  # n
        [320, 1390, 2530, 0.00, 0.22, 5600, 1600, 70, 130],  # s
        [300, 1840, 2750, 0.00, 0.25, 3100, 1200, 70, 130],  # sh
        [340, 1100, 2080, 0.00, 0.08, 6500, 5000, 60, 110],  # f
        [240, 1390, 2530, 0.30, 0.12, 5600, 1600, 50, 100],  # z
        [400, 1100, 2150, 0.00, 0.10, 1200, 1500, 50, 90],  # p
        [400, 1600, 2600, 0.00, 0.20, 4500, 2500, 50, 90],  # t
        [300, 1990, 2850, 0.00, 0.20, 2000, 800, 50, 90],  # k
        [200, 1100, 2150, 0.08, 0.06, 1000, 1500, 40, 80],  # b
        [200, 1600, 2600, 0.08, 0.12, 3800, 2500, 40, 80],  # d
        [200, 1990, 2850, 0.08, 0.12, 1900, 800, 40, 80],  # g
    ]
)
_FIRST_STOP = 10  # row of p; rows from here on are a closure, then a burst
_BURST = 2  # frames

_README = """SYNTHETIC SPEECH-LIKE AUDIO - NOT RECORDINGS OF PEOPLE

Made by `mrl-redimnet synthesise` (generator version {version}) from seed {seed}: pulse trains through moving
resonators, random phonemes, a random channel and noise level per session. The layout is VoxCeleb's:
  train/wav/<speaker>/<session>/<utterance>.wav   16 kHz, mono, 16-bit PCM
  test/wav/<speaker>/<session>/<utterance>.wav    other speakers
  test/trials.txt                                 "<1 same | 0 different speaker> <wav> <wav>", paths under test/wav
  metadata.csv, corpus.json                       one row per file; the parameters

The corpus shows that a training and scoring pipeline runs and that training helps. An equal error rate measured on it
says nothing about real voices, about VoxCeleb, or about which of two models is better on speech: the "speakers" differ
in fewer than twenty numbers drawn from simple distributions, and the sessions in eight.
"""


@dataclass(frozen=True)
class Speaker:
    """What stays the same across a synthetic speaker's sessions."""

    number: int
    gender: str  # "m" or "f": odd and even numbers
    f0: float  # mean fundamental frequency, Hz
    f0_range: float  # size of accents and declination, semitones
    tract: float  # formant scale relative to an average male tract, 0.8 to 1.25
    offsets: np.ndarray  # (3,) factors on F1..F3
    upper: np.ndarray  # (3 or 4,) F4 and above, Hz
    bandwidth: float  # factor on every bandwidth
    open_quotient: float  # open part of the glottal cycle
    tilt_hz: float  # cut-off of the LF return phase
    breath: float  # aspiration noise relative to the voiced source, rms
    jitter: float
    shimmer: float
    rate: float  # segment duration factor


def draw_speaker(seed: int, number: int) -> Speaker:
    """The speaker with this number (1, 2, ...; test speakers from 10001), a function of (seed, number) alone."""
    rng = SyntheticStream.SPEAKER.generator(seed, number)
    female = number % 2 == 0
    tract = float(np.clip((1.16 if female else 1.0) * np.exp(rng.normal(0, 0.06)), 0.8, 1.25))
    upper = np.array(_UPPER) * tract * np.exp(rng.normal(0, 0.06, len(_UPPER)))
    return Speaker(
        number=number,
        gender="f" if female else "m",
        f0=float((205 if female else 118) * np.exp(np.clip(rng.normal(0, 0.15), -0.35, 0.35))),
        f0_range=float(rng.uniform(1.0, 3.0)),
        tract=tract,
        offsets=np.exp(rng.normal(0, 0.05, 3)),
        upper=upper[upper < 7200],  # close to Nyquist a digital resonator meets its mirror image and whistles
        bandwidth=float(np.exp(rng.normal(0, 0.25))),
        open_quotient=float(rng.uniform(0.45, 0.75) + (0.05 if female else 0.0)),
        tilt_hz=float(np.exp(rng.uniform(np.log(700), np.log(4500)))),
        breath=float(10 ** rng.uniform(-1.8, -0.9)),
        jitter=float(rng.uniform(0.003, 0.015)),
        shimmer=float(rng.uniform(0.02, 0.1)),
        rate=float(rng.uniform(0.85, 1.15)),
    )


def synthesise(seed: int, number: int, session: int, utterance: int, seconds: tuple[float, float]) -> np.ndarray:
    """One utterance, a pure function of its arguments.

    Args:
        seed, number, session, utterance: non-negative integers; `number` is the speaker's, see `draw_speaker`.
        seconds: shortest and longest duration; the length is uniform between them, in steps of 10 ms.

    Returns:
        (samples,) float64 at 16 kHz, peak below 0.99, rms about -33 to -20 dB re full scale.
    """
    speaker = draw_speaker(seed, number)
    recording = SyntheticStream.SESSION.generator(seed, number, session)  # same draws for all utterances of a session
    rng = SyntheticStream.UTTERANCE.generator(seed, number, session, utterance)
    frames = int(round(rng.uniform(*seconds) * SAMPLING_RATE / _HOP))
    mood = np.exp(np.clip(recording.normal(0, 0.05), -0.1, 0.1))  # the same voice is not at the same pitch every day
    effort = np.exp(recording.normal(0, 0.2))  # nor equally loud, which moves the spectral tilt

    tracks, semitones = _plan(rng, frames, speaker.rate)
    times = np.arange(frames * _HOP) / _HOP
    f0 = speaker.f0 * mood * 2 ** (np.interp(times, np.arange(frames), semitones) * speaker.f0_range / 12)
    voice_level, noise_level = (np.interp(times, np.arange(frames), tracks[:, k]) for k in (3, 4))
    voiced = _filter_frames(voice_level * _source(rng, speaker, f0, effort), _tract_response(speaker, tracks))
    hiss = _filter_frames(noise_level * rng.normal(size=frames * _HOP), _noise_response(speaker, tracks))
    speech = voiced / _rms(voiced) * _rms(voice_level) + hiss
    return _record(recording, rng, speech)


def _rms(x: np.ndarray) -> float:
    return float(np.sqrt(np.mean(x**2))) + 1e-12


def _plan(rng: np.random.Generator, frames: int, rate: float) -> tuple[np.ndarray, np.ndarray]:
    """A random phrase: (frames, 7) control tracks, the table's columns, and (frames,) pitch contour, of unit size."""
    tracks, pitch = [], []

    def add(row: np.ndarray, level: float, accent: float, duration: int) -> None:
        scaled = row[:7].copy()
        scaled[3:5] *= level
        tracks.extend([scaled] * duration)
        pitch.extend([accent] * duration)

    while len(tracks) < frames:
        syllables = int(rng.integers(4, 10))
        for i in range(syllables):
            level = 10 ** (rng.normal(0, 2.5) / 20 - 0.2 * i / syllables)
            accent = 1.0 - 2.0 * i / syllables + rng.normal(0, 0.6)  # declination over the phrase, and accents
            for part, chance in ((_CONSONANTS, 0.85), (_VOWELS, 1.0), (_CONSONANTS, 0.25)):
                if rng.random() < chance:
                    k = int(rng.integers(len(part)))
                    row = part[k]
                    duration = max(2, int(rng.uniform(row[7], row[8]) * rate / 10))
                    if part is _CONSONANTS and k >= _FIRST_STOP:
                        add(row * np.array([1, 1, 1, 1, 0, 1, 1, 1, 1]), level, accent, duration)  # closure: no noise
                        duration = _BURST
                    add(row, level, accent, duration)
        add(tracks[-1] * np.array([1, 1, 1, 0, 0, 1, 1]), 1.0, 0.0, int(rng.integers(8, 25)))  # pause
    track, contour = np.array(tracks[:frames]), np.array(pitch[:frames])
    track[:, :3] = _smooth(track[:, :3], 9)  # articulators are slow ...
    track[:, 3:4] = _smooth(track[:, 3:4], 5)  # ... voicing is quicker, and noise is left sharp for bursts
    return track, _smooth(contour[:, None], 15)[:, 0]


def _smooth(x: np.ndarray, width: int) -> np.ndarray:
    """Columns of x (frames, k) through a Hann kernel of `width` frames (odd), edges held."""
    kernel = np.hanning(width + 2)[1:-1]
    padded = np.pad(x, ((width // 2, width // 2), (0, 0)), mode="edge")
    return np.stack([np.convolve(c, kernel / kernel.sum(), mode="valid") for c in padded.T], axis=1)


def _source(rng: np.random.Generator, speaker: Speaker, f0: np.ndarray, effort: float) -> np.ndarray:
    """Glottal source with lip radiation for a pitch contour (samples,) in Hz; (samples,) of about unit rms."""
    phase = np.cumsum(f0) / SAMPLING_RATE + rng.random()
    cycles = int(1.05 * phase[-1]) + 2  # jitter can only move the end by a few per cent
    jitter, shimmer = np.clip(rng.normal(size=(2, cycles)), -2.5, 2.5)
    phase = phase[0] + np.cumsum(f0 * (1 + speaker.jitter * jitter[phase.astype(int)])) / SAMPLING_RATE
    t = phase % 1.0
    strength = 1 + speaker.shimmer * shimmer[phase.astype(int)]  # changes where the flow is zero, so it never clicks
    opening, closed = speaker.open_quotient * 2 / 3, speaker.open_quotient
    # Rosenberg (1971), trigonometric pulse: raised-cosine opening, quarter-cosine closing, closed for the rest.
    closing = np.cos(np.pi / 2 * np.clip((t - opening) / (closed - opening), 0, 1))
    flow = np.where(t < opening, 0.5 - 0.5 * np.cos(np.pi * t / opening), closing)
    pulses = np.diff(flow * strength, prepend=flow[0] * strength[0])
    # The LF model's exponential return phase is, in frequency, a first-order low-pass.
    pole = np.exp(-2 * np.pi * min(speaker.tilt_hz * effort, 7000) / SAMPLING_RATE)
    pulses = lfilter([1 - pole], [1, -pole], pulses)
    aspiration = speaker.breath * rng.normal(size=t.size) * (0.3 + flow)  # strongest while the glottis is open
    return pulses / _rms(pulses) + aspiration


def _resonator(hz: np.ndarray, bandwidth: np.ndarray) -> np.ndarray:
    """Klatt (1980) digital resonators of unit gain at 0 Hz: (k,) Hz and (k,) Hz to (k, bins) complex response."""
    radius = np.exp(-np.pi * bandwidth / SAMPLING_RATE)[:, None]
    b = (2 * radius * np.cos(2 * np.pi * hz / SAMPLING_RATE)[:, None]).astype(np.float32)
    c = -(radius**2).astype(np.float32)  # single precision: most of the time goes here
    z = np.exp(-2j * np.pi * np.arange(_FFT // 2 + 1) / _FFT).astype(np.complex64)
    return (1 - b - c) / (1 - (b + c * z) * z)


def _noise_response(speaker: Speaker, tracks: np.ndarray) -> np.ndarray:
    """(frames, bins) complex response of the frication resonance, scaled so that white noise keeps its power."""
    places, place = np.unique(tracks[:, 5:7], axis=0, return_inverse=True)  # few: one per kind of phoneme
    response = _resonator(np.minimum(places[:, 0] * speaker.tract, 7500), places[:, 1])
    response /= np.sqrt(np.mean(np.abs(response) ** 2, axis=1, keepdims=True))
    return response[place.reshape(-1)]


def _tract_response(speaker: Speaker, tracks: np.ndarray) -> np.ndarray:
    """(frames, bins) complex response of the vocal tract: moving F1..F3 and the speaker's fixed formants above."""
    upper = _resonator(speaker.upper, speaker.bandwidth * (0.05 * speaker.upper + 50))
    response = np.prod(upper, axis=0)[None]
    for k, (base, slope) in enumerate(((50, 0.03), (50, 0.025), (60, 0.03))):
        hz = tracks[:, k] * speaker.tract * speaker.offsets[k]
        response = response * _resonator(hz, speaker.bandwidth * (base + slope * hz))
    return response


def _filter_frames(x: np.ndarray, response: np.ndarray) -> np.ndarray:
    """x (frames * hop,) through a filter that changes every frame, (frames, bins), by overlap-add; same length."""
    frames = len(response)
    blocks = np.pad(x, (_HOP // 2, _HOP + _HOP // 2)).reshape(-1, _HOP)
    window = np.hanning(2 * _HOP + 1)[:-1]  # periodic: neighbours sum to one, so each filter fades into the next
    windowed = np.concatenate([blocks[:frames], blocks[1 : frames + 1]], axis=1) * window
    y = np.fft.irfft(np.fft.rfft(windowed, _FFT) * response, _FFT)
    spans = -(-_FFT // _HOP)
    y = np.pad(y, ((0, 0), (0, spans * _HOP - _FFT))).reshape(frames, spans, _HOP)
    out = np.zeros((frames + spans, _HOP))
    for k in range(spans):
        out[k : k + frames] += y[:, k]
    return out.reshape(-1)[_HOP // 2 : _HOP // 2 + x.size]


def _record(recording: np.random.Generator, rng: np.random.Generator, speech: np.ndarray) -> np.ndarray:
    """Speech (samples,) as recorded: coloured room noise, a channel's tilt and band edges, and a level."""
    snr_db, colour = recording.uniform(20, 34), recording.uniform(0, 1)
    slope, low, high = recording.uniform(-1.5, 1.5), recording.uniform(50, 180), recording.uniform(5500, 7800)
    level = 10 ** ((recording.uniform(-32, -21) + rng.uniform(-1, 1)) / 20)
    hz = np.fft.rfftfreq(speech.size, 1 / SAMPLING_RATE)
    octaves = np.log2(np.maximum(hz, 50) / 1000)
    noise = np.fft.rfft(rng.normal(size=speech.size)) * 2 ** (-colour * octaves)
    noise *= _rms(speech) * 10 ** (-snr_db / 20) / _rms(np.fft.irfft(noise, speech.size))
    edges = 1 / np.sqrt((1 + (low / np.maximum(hz, 1)) ** 4) * (1 + (hz / high) ** 12))  # Butterworth magnitudes
    out = np.fft.irfft((np.fft.rfft(speech) + noise) * edges * 10 ** (slope * octaves / 20), speech.size)
    out *= level / _rms(out)
    return out * min(1.0, 0.98 / np.max(np.abs(out)))


def make_corpus(
    root: str | os.PathLike,
    train_speakers: int = 60,
    test_speakers: int = 16,
    sessions: int = 3,
    utterances: int = 4,
    seconds: tuple[float, float] = (2.0, 4.0),
    seed: int = 0,
) -> Path:
    """Write a synthetic corpus in VoxCeleb's layout (see the README it writes), or reuse the one already there.

    The corpus appears under its name only when complete. Speakers, sessions and utterances that two corpora of the same
    seed and `seconds` share are the same to the byte. The default corpus is about 45 minutes of audio.

    Args:
        root: folder to make, missing or empty; or one that already holds this very corpus, which is returned at once.
        train_speakers, test_speakers: disjoint; odd numbers are "m", even ones "f".
        sessions, utterances: sessions per speaker, utterances per session.
        seconds: shortest and longest utterance.
        seed: non-negative.

    Returns:
        root as a Path.

    Raises:
        ValueError: a parameter is out of range; the message names it.
        FileExistsError: root holds something else, or a corpus of other parameters.
    """
    root = Path(root)
    parameters = _check_parameters(train_speakers, test_speakers, sessions, utterances, seconds, seed)
    if _is_complete(root, parameters):
        return root
    root.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{root.name}.", dir=root.parent) as scratch:
        corpus = Path(scratch, "corpus")
        write_corpus(corpus, parameters)
        try:
            if root.is_dir():
                root.rmdir()  # empty, or it would have been refused above
            corpus.rename(root)
        except OSError:
            if not _is_complete(root, parameters):  # another process may have finished the same corpus first
                raise
    return root


def _check_parameters(
    train_speakers: int, test_speakers: int, sessions: int, utterances: int, seconds: tuple[float, float], seed: int
) -> dict:
    """The parameters as plain JSON values, with the generator's version."""
    counts = {
        "train_speakers": (train_speakers, 1, 9999),
        "test_speakers": (test_speakers, 2, 9999),
        "sessions": (sessions, 2, 100),  # target trials need two
        "utterances": (utterances, 1, 99999),
        "seed": (seed, 0, 2**63),
    }
    for name, (value, low, high) in counts.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer) or not low <= value <= high:
            raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value!r}")
    try:
        shortest, longest = (float(s) for s in seconds)
    except (TypeError, ValueError):
        raise ValueError(f"seconds must be a pair (shortest, longest), not {seconds!r}") from None
    if not 0.5 <= shortest <= longest <= 60:
        raise ValueError(f"seconds must satisfy 0.5 <= shortest <= longest <= 60, not {seconds!r}")
    values = {name: int(value) for name, (value, _, _) in counts.items()}
    return {"generator_version": GENERATOR_VERSION, **values, "seconds": [shortest, longest]}


def _is_complete(root: Path, parameters: dict) -> bool:
    """True if root is this corpus, False if it is missing or empty; FileExistsError otherwise."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return False
    try:
        found = json.loads((root / "corpus.json").read_text())
    except (OSError, ValueError):
        raise FileExistsError(
            f"{root} exists and is not a synthetic corpus: choose another folder or move it away"
        ) from None
    if found != parameters:
        raise FileExistsError(
            f"{root} holds a synthetic corpus of other parameters ({found}, wanted {parameters}): "
            "choose another folder, or delete this one to have it made again"
        )
    return True


def write_corpus(root: Path, p: dict) -> None:
    """All files of a corpus into a new folder."""
    numbers = {
        "train": range(1, 1 + p["train_speakers"]),
        "test": range(FIRST_TEST_SPEAKER, FIRST_TEST_SPEAKER + p["test_speakers"]),
    }
    rows = []
    for split, speakers in numbers.items():
        for number in speakers:
            for session in range(p["sessions"]):
                for utterance in range(p["utterances"]):
                    audio = synthesise(p["seed"], number, session, utterance, tuple(p["seconds"]))
                    path = root / split / "wav" / _wav(number, session, utterance)
                    path.parent.mkdir(parents=True, exist_ok=True)
                    soundfile.write(path, audio, SAMPLING_RATE, subtype="PCM_16")
                    gender = draw_speaker(p["seed"], number).gender
                    relative = path.relative_to(root).as_posix()
                    rows.append([split, relative, f"id{number:05d}", gender, f"{audio.size / SAMPLING_RATE:.2f}"])
    with open(root / "metadata.csv", "w", newline="") as f:
        writer = csv.writer(f, lineterminator="\n")
        writer.writerows([["split", "path", "speaker", "gender", "seconds"], *rows])
    trials = "".join(f"{label} {left} {right}\n" for label, left, right in trial_rows(p))
    (root / "test" / "trials.txt").write_text(trials)
    (root / "README.txt").write_text(_README.format(version=GENERATOR_VERSION, seed=p["seed"]))
    (root / "corpus.json").write_text(json.dumps(p, indent=1) + "\n")


def _wav(number: int, session: int, utterance: int) -> str:
    return f"id{number:05d}/s{session:02d}/{utterance:05d}.wav"


def trial_rows(p: dict) -> Iterator[tuple[int, str, str]]:
    """Trials (label, wav, wav): as many impostor as target pairs, at most MAX_TRIALS, each speaker equally often.

    Targets cross sessions. Impostors are of the same gender wherever the gender has another speaker: pitch and tract
    length alone would tell most mixed pairs apart.
    """
    rng = SyntheticStream.TRIALS.generator(p["seed"])
    count, sessions, utterances = p["test_speakers"], p["sessions"], p["utterances"]
    per_speaker = min(sessions * (sessions - 1) // 2 * utterances**2, max(1, MAX_TRIALS // 2 // count))
    seen: set[frozenset[str]] = set()
    for label in (1, 0):
        for i in range(min(count, MAX_TRIALS // 2)):
            rivals = [j for j in range(i % 2, count, 2) if j != i] or [j for j in range(count) if j != i]
            wanted = len(seen) + per_speaker
            while len(seen) < wanted:  # there are always more pairs than wanted, so this ends
                j, a, b = i, *rng.permutation(sessions)[:2]
                if not label:
                    j, a, b = rng.choice(rivals), *rng.integers(sessions, size=2)
                u, v = rng.integers(utterances, size=2)
                pair = _wav(FIRST_TEST_SPEAKER + i, a, u), _wav(FIRST_TEST_SPEAKER + j, b, v)
                if frozenset(pair) not in seen:
                    seen.add(frozenset(pair))
                    yield label, *pair
