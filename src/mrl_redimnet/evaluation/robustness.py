"""How much more a model errs when its audio is worse: relative EER change under a graded grid of perturbations.

After the N-best perturbation measure of Yu et al., "Investigating Training Strategies and Model Robustness of Low-Rank
Adaptation for Language Modeling in Speech Recognition" (arXiv 2401.10447), which tells the relative degradation of a
rescoring model when the best hypothesis alone is perturbed, or all N of them. Taken over: the degradation is relative
to the model's own clean error, and perturbing one input is told apart from perturbing several. Here a trial's inputs
are utterances: side "test" perturbs the test utterance alone (one), side "both" the enrolment as well (several). Not
taken over: word errors (here equal error rates), homophones and lists of hypotheses (here sounds), and the plain ratio.

At a condition p, change = (EER_p + s) / (EER_clean + s) - 1, with s = `SMOOTHING`. Without s the change of a list on
which a model hardly errs is any large number, and infinite in a bootstrap resample without a clean error. s pulls the
change towards 0, the more the smaller the errors: with a clean EER of 1 %, twice the errors are +67 %, with 10 % +95 %.
Plain EERs are kept beside every change.

The number of a kind is the geometric mean of 1 + change over its conditions, the one number that over the kinds, each
less 1: a kind counts once however many levels it has, and one extreme level does not outweigh all others. It is
relative: of two models the one with fewer errors in every condition can have the larger number, so the mean perturbed
EER (in the same weights, arithmetic) stands beside it. Intervals are of 95 % from one bootstrap over speakers, in
which systems are paired.

A perturbation is a callable: perturb(audio [samples] float32 at 16 kHz, generator) -> audio float32, of which speed and
duration change the length. Its draws depend on seed, path and perturbation and not on the level: an utterance has the
same stretch of noise at every SNR. A new perturbation is an entry in `PERTURBATIONS`.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torchaudio.functional import resample
from tqdm import tqdm

from configuration_mrl_redimnet import SAMPLING_RATE
from feature_extraction_mrl_redimnet import MRLReDimNetFeatureExtractor
from modeling_mrl_redimnet import MRLReDimNetPreTrainedModel
from mrl_redimnet.audio.augmentation import AddNoise, BandLimit, Clipping, mix_at_snr
from mrl_redimnet.audio.codecs import through_codec
from mrl_redimnet.audio.domains import simulate
from mrl_redimnet.audio.io import Source, name_of
from mrl_redimnet.audio.rooms import draw_room, reverberate, simulated_response
from mrl_redimnet.audio.scan import is_hidden, walk
from mrl_redimnet.audio.waveforms import Prepare, into_domain, read_waveform
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.evaluation.results import check_present
from mrl_redimnet.files import replace_text
from mrl_redimnet.plotting import new_figure, plain, save_figure
from mrl_redimnet.rows import ALL, SIDES, NumberRow
from mrl_redimnet.scoring.metrics import bootstrap_values, eer, quantile_interval
from mrl_redimnet.scoring.scorers import score
from mrl_redimnet.scoring.trials import Trials, UnknownSpeakersError
from mrl_redimnet.tables import markdown_table

SMOOTHING = 0.005
RESAMPLES = 200
REPORT, PICTURE = "robustness.json", "robustness.png"  # in the folder of the command

_ROOMS_DRAWN, _ROOMS_OF_A_LEVEL = 256, 4  # of a level: those whose RT60 is nearest to it
_FILES_AT_ONCE = 400  # of several systems' audio in memory: at 8 s each 200 MB

Perturb = Callable[[np.ndarray, np.random.Generator], np.ndarray]
Level = float | str


# ---------------------------------------------------------------- perturbations


def _white_noise(snr: float, noise: str | Path | None) -> Perturb:
    def perturb(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return mix_at_snr(audio, rng.standard_normal(len(audio)), snr)

    return perturb


def _noise(snr: float, noise: str | Path | None) -> Perturb:
    if noise is None:
        raise ValueError("noise: the perturbation noise needs a folder of noise files, none was given.")
    return AddNoise(noise, snr=(snr, snr), probability=1.0)


def _reverberation(rt60: float, noise: str | Path | None) -> Perturb:
    off = [abs(draw_room(0, index).rt60 - rt60) for index in range(_ROOMS_DRAWN)]
    rooms = np.argsort(off)[:_ROOMS_OF_A_LEVEL].tolist()

    def perturb(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return reverberate(audio, simulated_response(0, rooms[rng.integers(len(rooms))]))

    return perturb


def _codec(name: str, noise: str | Path | None) -> Perturb:
    return partial(through_codec, name)


def _bandwidth(cutoff: float, noise: str | Path | None) -> Perturb:
    return BandLimit((cutoff, cutoff))


def _speed(speed: float, noise: str | Path | None) -> Perturb:
    def perturb(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        return resample(torch.from_numpy(audio), round(SAMPLING_RATE * speed), SAMPLING_RATE).numpy()

    return perturb


def _duration(seconds: float, noise: str | Path | None) -> Perturb:
    samples = round(seconds * SAMPLING_RATE)

    def perturb(audio: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        start = int(rng.random() * (max(0, len(audio) - samples) + 1))
        return audio[start : start + samples]

    return perturb


def _clipping(level: float, noise: str | Path | None) -> Perturb:
    return Clipping((level, level))


class Perturbation(NamedTuple):
    """kind: what its number counts towards. levels: mild ones first, each printed with `unit`.
    build(level, folder of noise or None) -> the callable of a level.
    """

    kind: str
    levels: tuple[Level, ...]
    unit: str
    build: Callable[[Any, str | Path | None], Perturb]  # a level of its own: a number, or a name


PERTURBATIONS: dict[str, Perturbation] = {
    "noise": Perturbation("noise", (20, 10, 5, 0), "dB", _noise),  # SNR; any file of the folder
    "white_noise": Perturbation("noise", (20, 10, 0), "dB", _white_noise),
    "reverberation": Perturbation("reverberation", (0.25, 0.5, 0.75), "s", _reverberation),  # RT60, simulated rooms
    "codec": Perturbation("codec", ("mulaw", "gsm", "opus", "amr_nb"), "", _codec),  # rates as in `codecs`, drawn
    "bandwidth": Perturbation("bandwidth", (6000, 4000, 3000, 2000), "Hz", _bandwidth),  # nothing above it
    "speed": Perturbation("speed", (0.95, 1.05, 0.9, 1.1), "times", _speed),  # pitch moves with it
    "duration": Perturbation("duration", (5, 3, 2, 1, 0.5), "s", _duration),  # a drawn stretch; shorter ones stay
    "clipping": Perturbation("clipping", (0.4, 0.2, 0.1), "of peak", _clipping),
}


@dataclass(frozen=True, eq=False)  # eq=False: the generated hash would need one of the callable
class Condition:
    """A point of the grid: a perturbation at a level. name: of the perturbation, such as "noise/rain"."""

    kind: str
    name: str
    level: Level
    unit: str
    perturb: Perturb

    @property
    def label(self) -> str:
        """Such as "noise/rain 5 dB"."""
        return f"{self.name} {self.level} {self.unit}".strip()


def make_grid(
    noise: str | Path | None = None,
    noise_types: Sequence[str] | None = None,
    names: Sequence[str] | None = None,
    quick: bool = False,
) -> list[Condition]:
    """The conditions of the perturbations `names` of `PERTURBATIONS` (None: all that can be), at all their levels.

    noise: a folder of noise files; without one, "noise" is left out unless it is named. noise_types: sub-folders of it
    (such as MUSAN's music), each a perturbation "noise/..." of its own in the place of "noise"; an empty list stands
    for all of them. quick: only the last level of each.

    Raises ValueError for an unknown name, noise types without a folder or a folder that has none; FileNotFoundError for
    a folder without audio.
    """
    if names is None:
        names = [name for name in PERTURBATIONS if name != "noise" or noise is not None]
    if unknown := [name for name in names if name not in PERTURBATIONS]:
        raise ValueError(f"perturbations: unknown {', '.join(unknown)}; known: {', '.join(PERTURBATIONS)}.")
    if not names or len(set(names)) < len(names):
        raise ValueError(f"perturbations: got {list(names)}, expected one at least, and none twice.")
    if noise_types is not None and "noise" not in names:
        raise ValueError("noise types: there is no folder of noise, or noise is not among the perturbations.")
    grid = []
    for name in names:
        entry, folders = PERTURBATIONS[name], {name: noise}
        if name == "noise" and noise_types is not None:
            folders = {f"noise/{kind}": folder for kind, folder in _noise_folders(noise, noise_types).items()}
        for full_name, folder in folders.items():
            for level in entry.levels[-1:] if quick else entry.levels:
                grid.append(Condition(entry.kind, full_name, level, entry.unit, entry.build(level, folder)))
    return grid


def _noise_folders(noise: str | Path | None, types: Sequence[str]) -> dict[str, Path]:
    """Sub-folders by name: those of `types`, or all that hold audio."""
    if noise is None or not Path(noise).is_dir():
        raise FileNotFoundError(f"noise: {noise} is not a folder of noise files.")
    found = {
        folder.name: folder
        for folder in sorted(Path(noise).iterdir())
        if folder.is_dir() and not is_hidden(folder.name) and next(walk(folder), None) is not None
    }
    if not found or (unknown := [kind for kind in types if kind not in found]):
        wrong = ", ".join(unknown) if found else "any"
        raise ValueError(f"noise types: {noise} has no sub-folder {wrong} with audio; it has {', '.join(found) or 0}.")
    return {kind: found[kind] for kind in types or found}


# ---------------------------------------------------------------- results


@dataclass(frozen=True)
class CleanRow:
    """EER at one dimension of the audio as it is, in [0, 1]; the interval over speakers or None."""

    dim: int
    eer: float
    eer_low: float | None = None
    eer_high: float | None = None


@dataclass(frozen=True)
class PointRow:
    """One condition, side and dimension: EER in [0, 1], and the change against clean (0.5: half as much again)."""

    kind: str
    condition: str
    side: str
    dim: int
    eer: float
    change: float
    eer_low: float | None = None
    eer_high: float | None = None
    change_low: float | None = None
    change_high: float | None = None


@dataclass(frozen=True)
class DifferenceRow:
    """A system against the first one, with paired intervals or None.

    change: its 1 + change over the first's, less 1 (0.1: its errors grow by a tenth more). eer: its mean perturbed EER
    less the first's.
    """

    system: str
    kind: str
    side: str
    dim: int
    change: float
    eer: float
    change_low: float | None = None
    change_high: float | None = None
    eer_low: float | None = None
    eer_high: float | None = None


@dataclass(frozen=True)
class RobustnessReport:
    """What `robustness` measured of one system. trials, utterances, resamples: how many; seed: of the perturbations."""

    system: str
    trials: int
    utterances: int
    resamples: int
    seed: int
    clean: list[CleanRow]
    points: list[PointRow]
    numbers: list[NumberRow]
    smoothing: float = SMOOTHING

    @property
    def dims(self) -> list[int]:
        """The dimensions that were measured."""
        return [row.dim for row in self.clean]

    def number(self, side: str, dim: int, kind: str = ALL) -> NumberRow:
        """A row of `numbers`; ValueError, naming what there is, for one that is not there."""
        for row in self.numbers:
            if (row.side, row.dim, row.kind) == (side, dim, kind):
                return row
        kinds = ", ".join(dict.fromkeys(row.kind for row in self.numbers))
        raise ValueError(
            f"no number of {kind!r}, side {side!r}, {dim} dimensions; there are kinds {kinds}, sides "
            f"{', '.join(SIDES)}, dimensions {', '.join(map(str, self.dims))}."
        )


def save_reports(
    reports: Sequence[RobustnessReport], file: str | Path, differences: Sequence[DifferenceRow] = ()
) -> None:
    """Writes reports, and how systems differ from the first, as JSON, whole or not at all."""
    record = {"systems": [asdict(report) for report in reports], "differences": [asdict(row) for row in differences]}
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    replace_text(Path(file), text)


def load_reports(file: str | Path) -> tuple[list[RobustnessReport], list[DifferenceRow]]:
    """What `save_reports` wrote. Raises FileNotFoundError, or ValueError naming a file that is none."""
    try:
        record = json.loads(Path(file).read_text(encoding="utf-8"))
        return [_report(system) for system in record["systems"]], [DifferenceRow(**r) for r in record["differences"]]
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} holds no robustness reports: {error!r}") from error


def _report(record: dict) -> RobustnessReport:
    kinds = {"clean": CleanRow, "points": PointRow, "numbers": NumberRow}
    return RobustnessReport(**{**record, **{key: [row(**r) for r in record[key]] for key, row in kinds.items()}})


# ---------------------------------------------------------------- measuring


def robustness(
    model: MRLReDimNetPreTrainedModel,
    trials: Trials,
    folder: str | Path,
    grid: Sequence[Condition],
    dims: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    system: str = "model",
    progress: str | None = None,
) -> RobustnessReport:
    """The report of one model, called `system`; arguments and errors as in `compare`."""
    reports, _ = compare({system: model}, trials, folder, grid, dims, resamples, seed, progress)
    return reports[0]


def compare(
    models: Mapping[str, MRLReDimNetPreTrainedModel],
    trials: Trials,
    folder: str | Path,
    grid: Sequence[Condition],
    dims: Sequence[int] | None = None,
    resamples: int = RESAMPLES,
    seed: int = 0,
    progress: str | None = None,
) -> tuple[list[RobustnessReport], list[DifferenceRow]]:
    """Reports of several systems on the same perturbed audio, and how each but the first differs from the first.

    Every utterance is perturbed once per condition and embedded once by each system; both sides and all dimensions come
    from these embeddings. Scores are cosines.

    trials: its utterances lie below `folder`. grid: from `make_grid`. dims: prefixes to report (None: those that all
    the models were built for). resamples: of the intervals over speakers, 0 for none. seed: of the perturbations.

    Raises ValueError for no model, an empty grid, one with a condition twice, or a dimension out of range;
    UnknownSpeakersError for a list that does not tell its speakers, unless resamples is 0; FileNotFoundError listing
    utterances that are not there; AudioError for one that cannot be read.
    """
    dims = _checked_dims(models, dims)
    labels = [condition.label for condition in grid]
    if not labels or len(set(labels)) < len(labels):
        raise ValueError(f"grid: expected a condition at least, and none twice, got {labels}.")
    if resamples < 0:
        raise ValueError(f"resamples: got {resamples}, expected 0 (no intervals) or more.")
    check_present(trials, folder)
    if resamples:
        _check_speakers(trials)
    files = [Path(folder) / path for path in trials.utterances]
    clean = _embedded(models, files, into_domain(folder))
    measured = {name: _Measured(trials, clean[name], dims, resamples) for name in models}
    for condition in tqdm(grid, desc=progress, disable=progress is None, leave=False):
        perturbed = _embedded(models, files, _perturbing(folder, condition, seed))
        for name in models:
            measured[name].add(condition, perturbed[name])
    first, *others = measured
    reports = [one.report(name, seed) for name, one in measured.items()]
    return reports, [row for name in others for row in measured[name].differences(name, measured[first])]


def _checked_dims(models: Mapping[str, MRLReDimNetPreTrainedModel], dims: Sequence[int] | None) -> list[int]:
    if not models:
        raise ValueError("models: got none, expected at least one.")
    smallest = min(model.config.embedding_size for model in models.values())
    if dims is None:
        dims = sorted(set.intersection(*(set(model.config.matryoshka_dims) for model in models.values())))
    if not dims or len(set(dims)) < len(dims) or not all(1 <= dim <= smallest for dim in dims):
        raise ValueError(f"dims: got {list(dims)}, expected some, none twice, from 1 to the embeddings' {smallest}.")
    return list(dims)


def _check_speakers(trials: Trials) -> None:
    """Before the minutes of embedding, not after them."""
    try:
        trials.speakers  # noqa: B018
    except UnknownSpeakersError as error:
        raise UnknownSpeakersError(f"{error}. Without intervals (resamples 0) the list can be used.") from error


def _perturbing(folder: str | Path, condition: Condition, seed: int) -> Prepare:
    """What makes a file below `folder` sound as the condition has it."""
    clean = into_domain(folder)

    def prepare(file: Source, audio: np.ndarray) -> np.ndarray:
        drawn_by = f"{condition.name}/{Path(name_of(file)).relative_to(folder).as_posix()}"
        return simulate(condition.perturb, clean(file, audio), drawn_by, seed)

    return prepare


def _embedded(
    models: Mapping[str, MRLReDimNetPreTrainedModel], files: Sequence[Path], prepare: Prepare
) -> dict[str, np.ndarray]:
    """Embeddings [N, D] of the files by every model; several models share what is read and perturbed."""
    encoders = {name: SpeakerEncoder(model) for name, model in models.items()}
    if len(encoders) == 1:
        return {name: encoder.embed(files, prepare=prepare) for name, encoder in encoders.items()}
    extractor = MRLReDimNetFeatureExtractor(min_samples=max(e.config.min_samples for e in encoders.values()))
    parts: dict[str, list[np.ndarray]] = {name: [] for name in models}
    for start in range(0, len(files), _FILES_AT_ONCE):
        part = files[start : start + _FILES_AT_ONCE]
        waveforms = [read_waveform(file, str(file), extractor, prepare) for file in part]
        for name, encoder in encoders.items():
            parts[name].append(encoder.embed(waveforms))
    return {name: np.concatenate(embedded) for name, embedded in parts.items()}


class _Measured:
    """EERs of one system as arrays [1 + resamples]: that of the list, then those of its resamples."""

    def __init__(self, trials: Trials, clean: np.ndarray, dims: Sequence[int], resamples: int) -> None:
        self.trials, self.clean_embeddings, self.dims, self.resamples = trials, clean, dims, resamples
        # For side "test" one matrix holds clean rows and, under marked names, perturbed ones.
        self.mixed_names = [*trials.utterances, *(_marked(path) for path in trials.utterances)]
        self.mixed_trials = replace(trials, test=[_marked(path) for path in trials.test])
        self.clean = {dim: self._eers(score(trials, trials.utterances, clean, dim)) for dim in dims}
        self.perturbed: dict[tuple[Condition, str, int], np.ndarray] = {}

    def add(self, condition: Condition, embeddings: np.ndarray) -> None:
        """embeddings [N, D] of the utterances in the condition."""
        mixed = np.concatenate([self.clean_embeddings, embeddings])
        for dim in self.dims:
            scores = {
                "test": score(self.mixed_trials, self.mixed_names, mixed, dim),
                "both": score(self.trials, self.trials.utterances, embeddings, dim),
            }
            for side in SIDES:
                self.perturbed[condition, side, dim] = self._eers(scores[side])

    def _eers(self, scores: np.ndarray) -> np.ndarray:
        labels = self.trials.labels
        values = [eer(scores, labels)]
        if self.resamples:
            values += bootstrap_values(scores, labels, *self.trials.speakers, eer, self.resamples).tolist()
        return np.array(values)

    def changes(self, condition: Condition, side: str, dim: int) -> np.ndarray:
        """[1 + resamples], see the module."""
        return (self.perturbed[condition, side, dim] + SMOOTHING) / (self.clean[dim] + SMOOTHING) - 1

    def numbers(self, side: str, dim: int) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """Change and mean perturbed EER, both [1 + resamples], of every kind and of `ALL`."""
        logs: dict[str, list[np.ndarray]] = {}
        rates: dict[str, list[np.ndarray]] = {}
        for condition in dict.fromkeys(key[0] for key in self.perturbed):
            logs.setdefault(condition.kind, []).append(np.log1p(self.changes(condition, side, dim)))
            rates.setdefault(condition.kind, []).append(self.perturbed[condition, side, dim])
        means = {kind: (np.mean(logs[kind], axis=0), np.mean(rates[kind], axis=0)) for kind in logs}
        means[ALL] = tuple(np.mean([mean[i] for mean in means.values()], axis=0) for i in range(2))
        return {kind: (np.expm1(log), rate) for kind, (log, rate) in means.items()}

    def report(self, system: str, seed: int) -> RobustnessReport:
        """All of it, with intervals from the resamples; seed: of the perturbations."""
        clean = [CleanRow(dim, *_summary("eer", values).values()) for dim, values in self.clean.items()]
        points = [
            PointRow(
                condition.kind,
                condition.label,
                side,
                dim,
                **_summary("eer", values),
                **_summary("change", self.changes(condition, side, dim)),
            )
            for (condition, side, dim), values in self.perturbed.items()
        ]
        numbers = [
            NumberRow(kind, side, dim, **_summary("change", change), **_summary("eer", rate))
            for side in SIDES
            for dim in self.dims
            for kind, (change, rate) in self.numbers(side, dim).items()
        ]
        counts = (len(self.trials), len(self.trials.utterances), self.resamples)
        return RobustnessReport(system, *counts, seed, clean, points, numbers)

    def differences(self, system: str, first: "_Measured") -> list[DifferenceRow]:
        """Against the first system. Resamples are of the same speakers, so their differences are paired."""
        rows = []
        for side in SIDES:
            for dim in self.dims:
                of_first = first.numbers(side, dim)
                for kind, (change, rate) in self.numbers(side, dim).items():
                    first_change, first_rate = of_first[kind]
                    more = _summary("change", (1 + change) / (1 + first_change) - 1)
                    rows.append(DifferenceRow(system, kind, side, dim, **more, **_summary("eer", rate - first_rate)))
        return rows


def _marked(path: str) -> str:
    """The name of an utterance's perturbed row; still below its speaker's folder."""
    return f"{path}#perturbed"


def _summary(name: str, values: np.ndarray) -> dict[str, Any]:
    """The value and its interval from [1 + resamples], as a row's fields."""
    low, high = quantile_interval(values[1:]) if len(values) > 1 else (None, None)
    return {name: float(values[0]), f"{name}_low": low, f"{name}_high": high}


# ---------------------------------------------------------------- text and picture


def format_numbers(report: RobustnessReport) -> str:
    """A Markdown table, aligned to be read as it is: a line per kind, a column per side and dimension, change in %."""
    columns = [(side, dim) for side in SIDES for dim in report.dims]
    clean = {row.dim: row for row in report.clean}
    lines = [[f"EER change %, {report.system}", *(f"{side}, {dim} dims" for side, dim in columns)]]
    lines.append(["clean EER %", *(f"{100 * clean[dim].eer:.2f}" for _, dim in columns)])
    for kind in dict.fromkeys(row.kind for row in report.numbers):
        rows = [report.number(side, dim, kind) for side, dim in columns]
        lines.append([kind, *(_signed(row.change) for row in rows)])
        if kind == ALL and report.resamples:
            lines.append(["all, 95 % interval", *map(_interval, rows)])
        if kind == ALL:
            lines.append(["mean perturbed EER %", *(f"{100 * row.eer:.2f}" for row in rows)])
    return markdown_table(lines)


def heat_map(reports: Sequence[RobustnessReport], file: str | Path, dim: int | None = None) -> None:
    """Draws a picture (PNG, or what the file's suffix says): a row per condition, change in % and EER % in its cells.

    Columns, per side: of one report its dimensions (or `dim` alone); of several the systems, at `dim` (None: the
    largest that all have). Colours are by the factor: as much redder for twice the errors as bluer for half of them.
    The picture is written whole or not at all. Raises ValueError for no reports, a dimension that is missing in one, or
    reports of different grids.
    """
    columns, titles = _heat_columns(reports, dim)
    labels = [list(dict.fromkeys(row.condition for row in report.points)) for report in reports]
    if any(names != labels[0] for names in labels):
        raise ValueError("reports: their grids differ, expected reports of one grid.")
    kinds = [next(row.kind for row in reports[0].points if row.condition == label) for label in labels[0]]
    factors = np.empty((len(labels[0]) + 1, len(columns)))
    texts = [[""] * len(columns) for _ in factors]
    for across, (report, side, width) in enumerate(columns):
        at = {row.condition: row for row in report.points if (row.side, row.dim) == (side, width)}
        rows: list[PointRow | NumberRow] = [*(at[label] for label in labels[0]), report.number(side, width)]
        for down, row in enumerate(rows):
            factors[down, across] = math.log2(1 + row.change)
            texts[down][across] = f"{_signed(row.change)}  ({100 * row.eer:.1f})"
    draw_cells(
        factors, texts, [*labels[0], "the number (mean EER)"], kinds, titles, _heat_title(reports, columns), file
    )


def _heat_columns(
    reports: Sequence[RobustnessReport], dim: int | None
) -> tuple[list[tuple[RobustnessReport, str, int]], list[str]]:
    """Report, side and dimension of each column, and its heading."""
    if not reports:
        raise ValueError("reports: got none, expected at least one.")
    if dim is None and len(reports) > 1:
        dim = max(set.intersection(*(set(report.dims) for report in reports)), default=None)
    dims = reports[0].dims if dim is None else [dim]
    if lacking := [report.system for report in reports if not set(dims) <= set(report.dims)]:
        raise ValueError(f"dims: {dims} were not all measured of {', '.join(lacking)}.")
    columns = [(report, side, width) for side in SIDES for report in reports for width in dims]
    if len(reports) == 1:
        return columns, [str(width) for _, _, width in columns]
    return columns, [report.system for report, _, _ in columns]


def _heat_title(reports: Sequence[RobustnessReport], columns: Sequence[tuple[RobustnessReport, str, int]]) -> str:
    what = "Relative EER change in % (EER in %)"
    if len(reports) > 1:
        return f"{what} at {columns[0][2]} dimensions"
    clean = ", ".join(f"{row.dim}: {100 * row.eer:.1f}" for row in reports[0].clean)
    return f"{what} of {reports[0].system}, per dimension\nclean EER % at {clean}"


def draw_cells(
    factors: np.ndarray,
    texts: Sequence[Sequence[str]],
    labels: Sequence[str],
    kinds: Sequence[str],
    titles: Sequence[str],
    title: str,
    file: str | Path,
) -> None:
    """Draws factors [conditions + 1, columns] as colours, with texts of the same shape; the last row is the number.

    labels: of the rows; kinds: of the conditions, between which a line is drawn; titles: of the columns.
    """
    down, across = factors.shape
    figure = new_figure(2.6 + 1.05 * across, 1.6 + 0.26 * down)
    axes = figure.subplots()
    most = max(1.0, min(4.0, float(np.abs(factors).max())))  # 16 times the errors and more look alike
    axes.imshow(factors, cmap="RdBu_r", vmin=-most, vmax=most, aspect="auto")
    for y, x in np.ndindex(down, across):
        bright = abs(factors[y, x]) > 0.6 * most
        weight = "bold" if y == down - 1 else "normal"
        axes.text(
            x, y, texts[y][x], ha="center", va="center", fontsize=7.5, color="w" if bright else "k", weight=weight
        )
    starts = [y for y in range(1, down - 1) if kinds[y] != kinds[y - 1]]
    for y in [*starts, down - 1]:
        axes.axhline(y - 0.5, color="k", linewidth=1.6 if y == down - 1 else 0.6)
    half = across // len(SIDES)
    axes.axvline(half - 0.5, color="k", linewidth=1.6)
    axes.set_yticks(range(down), labels, fontsize=8)
    longest = max(map(len, titles))
    axes.set_xticks(range(across), [plain(name) for name in titles], fontsize=8, rotation=30 if longest > 14 else 0)
    axes.tick_params(length=0)
    for i, heading in enumerate(("test side alone perturbed", "enrolment and test perturbed")):
        axes.text((i + 0.5) * half - 0.5, -0.75, heading, ha="center", va="bottom", fontsize=9, weight="bold")
    figure.suptitle(plain(title), fontsize=10)
    save_figure(figure, file, dpi=150)


def _interval(row: NumberRow) -> str:
    """The bounds of a change, empty where there are none."""
    if row.change_low is None or row.change_high is None:
        return ""
    return f"[{_signed(row.change_low)}, {_signed(row.change_high)}]"


def _signed(share: float) -> str:
    """In whole per cent with its sign, without one at 0."""
    return f"{round(100 * share):+d}" if round(100 * share) else "0"
