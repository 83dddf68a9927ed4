"""From scores to decisions: calibrated log-likelihood ratios, thresholds for a false-accept rate, and their file.

Cosines of 64 and of 256 dimensions, of two adapters, and of one and three averaged enrolment utterances mean different
things: each has its own calibration and its own threshold, which `thresholds.json` keeps beside the model. A threshold
is for one comparison; a search among many enrolled speakers takes a higher one, see `Threshold.for_search`.
"""

import json
import math
import warnings
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mrl_redimnet.extras import extra
from mrl_redimnet.files import replace_text
from mrl_redimnet.fingerprints import same_weights

THRESHOLDS_FILE = "thresholds.json"
VERSION = 2
READABLE = (1, 2)  # the first had no `steeper`
_LISTED = 3  # entries that a message about a missing one names, the nearest first
RIDGE = 1e-6  # keeps the slope finite where the scores separate the trials; far below what moves any other fit
TAIL_STEP = 1.1  # each stored number of accepted impostors is at most so many times the one before it
RULE_OF = 30  # errors that tell a rate within 30 % with 90 % confidence (Doddington et al., Speech Communication 2000)


@dataclass(frozen=True)
class Calibration:
    """A map from scores to natural-log likelihood ratios, linear in the score and, where it knows durations, in theirs.

        llr = offset + shorter * ln(short) + longer * ln(long) + (slope + steeper * ln(short)) * score

    `short` and `long` are the durations of both sides in seconds, whichever is the enrolment. They are quality
    measures in the sense of Mandasari et al., "Quality Measure Functions for Calibration of Speaker Recognition Systems
    in Various Duration Conditions", IEEE TASLP 21(11), 2013: short sides make both kinds of trial score lower, and the
    offset follows. A score of short speech also says less, and the slope follows, which is added here. Durations
    outside those of the fit count as the nearest inside.

    Attributes:
        offset, slope: of the score; a higher score is never less likely a target.
        shorter, longer: of the durations, per ln second; None without duration terms.
        seconds: shortest and longest side the fit has seen.
        prior: of a target trial, on which the fit laid its weight.
        targets, impostors: how many trials it was fitted on.
        steeper: what the slope gains per ln second of the shorter side.
    """

    offset: float
    slope: float
    shorter: float | None = None
    longer: float | None = None
    seconds: tuple[float, float] | None = None
    prior: float = 0.01
    targets: int = 0
    impostors: int = 0
    steeper: float = 0.0

    def __post_init__(self) -> None:
        if self.uses_seconds == (self.seconds is None) or (self.shorter is None) != (self.longer is None):
            raise ValueError("shorter, longer and seconds belong together: all of them, or none.")
        values = [self.offset, self.slope, self.steeper, *(self.seconds or ())]
        if self.uses_seconds:
            values += [self.shorter, self.longer]
        usable = all(isinstance(value, int | float) and math.isfinite(value) for value in values)
        usable = usable and all(value > 0 for value in self.seconds or ())
        if not usable or min(self._slopes(np.log(self.seconds or (1.0,)))) <= 0:
            raise ValueError(f"calibration: {values} must be finite numbers, durations and the slope positive.")

    @property
    def uses_seconds(self) -> bool:
        """Whether durations are needed."""
        return self.shorter is not None

    @classmethod
    def fit(
        cls, scores: ArrayLike, labels: ArrayLike, seconds: ArrayLike | None = None, prior: float = 0.01
    ) -> "Calibration":
        """Logistic regression by weighted maximum likelihood.

        The targets weigh `prior` in all and the impostors 1 - prior, whatever their numbers, and the prior's log odds
        are taken out of what is fitted, so the result is a likelihood ratio (Brummer and du Preez,
        "Application-independent evaluation of speaker detection", Computer Speech and Language 2006; FoCal, BOSARIS).

        Args:
            scores: [T] finite. labels: [T] 1 target, 0 impostor.
            seconds: [T, 2] positive durations of the two sides; None: no duration terms.
            prior: in (0, 1), of target trials where the result is used.

        Raises:
            ValueError: bad trials, durations or prior, scores that are all alike, or higher for impostors.
        """
        scores, targets = _checked(scores, labels)
        if not 0.0 < prior < 1.0:
            raise ValueError(f"prior must be between 0 and 1 (both excluded), got {prior}")
        if np.ptp(scores) == 0:
            raise ValueError(f"all {len(scores)} scores are {scores[0]}: nothing to calibrate")
        limits = shorter = longer = None
        steeper = 0.0
        if seconds is None:
            offset, (slope,) = _logistic(scores[:, None], targets, prior)
        else:
            limits, logs = _log_seconds(seconds, len(scores))
            offset, (slope, shorter, longer, steeper) = _logistic_of_seconds(scores, logs, targets, prior)
        if min(slope + steeper * np.log(limits or (1.0,))) <= 0:
            raise ValueError(
                f"targets do not score higher than impostors (slope {slope:.3g} over {targets.sum()} targets and "
                f"{(~targets).sum()} impostors): are the labels swapped, or the scores distances?"
            )
        counts = int(targets.sum()), int((~targets).sum())
        return cls(offset, slope, shorter, longer, limits, prior, *counts, steeper)

    def __call__(self, scores: ArrayLike, seconds: ArrayLike | None = None) -> NDArray:
        """Scores [T], and with duration terms seconds [T, 2] -> natural-log likelihood ratios, float64 [T].

        Without duration terms `seconds` may be given all the same. Raises ValueError where they are needed and missing
        or do not fit the scores.
        """
        scores = np.asarray(scores, dtype=np.float64)
        offset, slope = self._line(seconds, scores.size)
        return offset + slope * scores

    def score_at(self, llrs: ArrayLike, seconds: ArrayLike | None = None) -> NDArray:
        """Likelihood ratios [T], and seconds [T, 2] as for a call -> the scores that they belong to, float64 [T]."""
        llrs = np.asarray(llrs, dtype=np.float64)
        offset, slope = self._line(seconds, llrs.size)
        return (llrs - offset) / slope

    def _line(self, seconds: ArrayLike | None, trials: int) -> tuple[NDArray, NDArray]:
        """Offsets and slopes of trials, [T] or one for all."""
        if self.shorter is None or self.longer is None:
            return np.asarray(self.offset), np.asarray(self.slope)
        if seconds is None:
            raise ValueError("this calibration has duration terms: give the seconds [T, 2] of both sides")
        _, logs = _log_seconds(seconds, trials, self.seconds)
        return self.offset + self.shorter * logs[:, 0] + self.longer * logs[:, 1], self._slopes(logs[:, 0])

    def _slopes(self, log_shorter: NDArray) -> NDArray:
        return self.slope + self.steeper * log_shorter


def threshold_at(scores: ArrayLike, labels: ArrayLike, rate: float) -> float:
    """The lowest threshold at which at most `rate` of the impostors are accepted (score >= threshold).

    Impostors with equal scores are accepted or rejected together, so with ties the realised rate is lower. Fewer than
    1 / rate impostors cannot show such a rate and are refused; with fewer than 30 / rate, the rule of 30, the
    threshold is warned about as uncertain. (Trials that share speakers say less than their number.)

    Raises ValueError: a rate outside (0, 1), bad trials, or too few impostors (says how many are needed).
    """
    scores, targets = _checked(scores, labels)
    impostors = np.sort(scores[~targets])[::-1]
    accepted = _accepted(len(impostors), rate)
    if accepted < RULE_OF:
        warnings.warn(
            f"a false-accept rate of {rate:g} rests on {accepted} of {len(impostors):,} impostor trials: uncertain; "
            f"{math.ceil(RULE_OF / rate):,} impostor trials would tell it within 30 %",
            stacklevel=2,
        )
    return float(np.nextafter(impostors[accepted], np.inf))


def _accepted(impostors: int, rate: float) -> int:
    """How many of so many impostors may be accepted at a false-accept rate. ValueError where it is not even one."""
    if not 0.0 < rate < 1.0:
        raise ValueError(f"the wanted false-accept rate must be between 0 and 1 (both excluded), got {rate}")
    accepted = math.floor(impostors * rate)
    accepted += (accepted + 1) / impostors <= rate  # 100 * 0.29 is 28.999...
    accepted -= accepted / impostors > rate
    if accepted < 1:
        raise ValueError(
            f"{impostors:,} impostor trials cannot show a false-accept rate of {rate:.3g}: it takes at least "
            f"{math.ceil(1 / rate):,}, and {math.ceil(RULE_OF / rate):,} to know it within 30 %"
        )
    return accepted


def _tail(impostors: NDArray, most: int) -> tuple[tuple[int, float], ...]:
    """Impostors' scores -> (how many are accepted, the lowest threshold at which they are): from 1 up to `most`."""
    ranked, counts = np.sort(impostors)[::-1], [1]
    while counts[-1] < most:
        counts.append(min(most, max(counts[-1] + 1, int(counts[-1] * TAIL_STEP))))
    return tuple((count, float(np.nextafter(ranked[count], np.inf))) for count in counts)


@dataclass(frozen=True)
class Threshold:
    """When to accept, for one dimension of one set of weights.

    Attributes:
        dim: length of the prefix. scorer: `str()` of the scorer, its cohort included.
        adapter: its name, or None for the base. weights: what embedded, see `SpeakerEncoder.fingerprint`.
        enrolments: how many utterances of a speaker were averaged for each enrolment.
        threshold: accept at or above; of scores, or of llrs where the calibration has duration terms.
        wanted: the false-accept rate asked for. false_accepts, misses: the rates on the trials it was set on.
        trials: name of those trials. targets, impostors: how many they were.
        calibration: fitted on the same trials.
        tail: (number of accepted impostors, the threshold for that), for lower rates than `wanted`; see `for_search`.
            Empty in what was saved before there were searches.
    """

    dim: int
    scorer: str
    adapter: str | None
    weights: str
    threshold: float
    wanted: float
    false_accepts: float
    misses: float
    trials: str
    targets: int
    impostors: int
    calibration: Calibration
    enrolments: int = 1
    tail: tuple[tuple[int, float], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "tail", tuple(map(tuple, self.tail)))  # lists, as JSON has them, are welcome
        for name, kind in _FIELDS.items():
            value = getattr(self, name)
            if not isinstance(value, kind) or isinstance(value, bool) or value != value:
                raise ValueError(f"{name}: got {value!r}")
        if self.enrolments < 1:
            raise ValueError(f"enrolments: got {self.enrolments}, expected 1 or more")
        for pair in self.tail:
            count, value = pair if len(pair) == 2 else (None, None)
            if not isinstance(count, int) or not isinstance(value, int | float) or not math.isfinite(value):
                raise ValueError(f"tail: got {pair!r}, expected a number of impostors and a threshold")

    @classmethod
    def fit(
        cls,
        scores: ArrayLike,
        labels: ArrayLike,
        *,
        wanted: float,
        dim: int,
        weights: str,
        trials: str,
        adapter: str | None = None,
        scorer: object = "cosine",
        seconds: ArrayLike | None = None,
        prior: float = 0.01,
        enrolments: int = 1,
    ) -> "Threshold":
        """Calibrates scores [T] of labels [T], with duration terms where `seconds` [T, 2] are given, and sets the
        threshold for a false-accept rate `wanted`. scorer: a `Scorer` or its `str()`. enrolments: how many utterances
        were averaged for each enrolment of the trials. Errors as in `Calibration.fit` and `threshold_at`.
        """
        calibration = Calibration.fit(scores, labels, seconds, prior)
        values, targets = _checked(calibration(scores, seconds) if calibration.uses_seconds else scores, labels)
        threshold = threshold_at(values, labels, wanted)
        accepted = values >= threshold
        return cls(
            dim=int(dim),
            scorer=str(scorer),
            adapter=adapter,
            weights=weights,
            threshold=threshold,
            wanted=wanted,
            false_accepts=float(accepted[~targets].mean()),
            misses=float(1 - accepted[targets].mean()),
            trials=trials,
            targets=int(targets.sum()),
            impostors=int((~targets).sum()),
            calibration=calibration,
            enrolments=int(enrolments),
            tail=_tail(values[~targets], _accepted(int((~targets).sum()), wanted)),
        )

    def for_search(self, speakers: int) -> tuple[float, int]:
        """The threshold for the best of `speakers` enrolled ones, and how many impostor trials it rests on.

        A stranger is compared with all of them, and is to be taken for any of them at the rate `wanted`: each
        comparison is allowed 1 - (1 - wanted)^(1 / speakers). That is exact where a stranger's scores with different
        speakers are independent; where they rise and fall together, as they do, fewer strangers are accepted.

        Raises ValueError where the impostor trials are too few for that rate (says how many it takes), or were not
        kept (a threshold of an earlier version).
        """
        if speakers == 1:
            return self.threshold, round(self.false_accepts * self.impostors)
        if not self.tail:
            raise ValueError(
                "the threshold was saved by an earlier version, without what a search among several speakers needs: "
                "set it again with `mrl-redimnet calibrate`"
            )
        allowed = _accepted(self.impostors, -math.expm1(math.log1p(-self.wanted) / speakers))
        count, threshold = max(pair for pair in self.tail if pair[0] <= allowed)
        return threshold, count

    def judge(self, scores: ArrayLike, seconds: ArrayLike | None = None) -> tuple[NDArray, NDArray]:
        """Scores [T], with duration terms also seconds [T, 2] -> accepted bool [T], natural-log LLRs [T]."""
        llrs = self.calibration(scores, seconds)
        values = llrs if self.calibration.uses_seconds else np.asarray(scores, dtype=np.float64)
        return values >= self.threshold, llrs

    @property
    def key(self) -> tuple[str | None, int, str, int]:
        """What there is one threshold of."""
        return self.adapter, self.dim, self.scorer, self.enrolments

    def __str__(self) -> str:
        return _named(*self.key)


def _named(adapter: str | None, dim: int, scorer: object, enrolments: int) -> str:
    averaged = "" if enrolments == 1 else f", {enrolments} enrolment utterances"
    return f"{dim} dims, {'no adapter' if adapter is None else adapter}, {scorer}{averaged}"


_FIELDS = {
    **dict.fromkeys(["dim", "targets", "impostors", "enrolments"], int),
    **dict.fromkeys(["scorer", "weights", "trials"], str),
    **dict.fromkeys(["threshold", "wanted", "false_accepts", "misses"], int | float),
    "adapter": str | None,
    "calibration": Calibration,
}


@dataclass
class Thresholds:
    """The content of thresholds.json: at most one entry per adapter, dimension, scorer and number of enrolments."""

    entries: list[Threshold] = field(default_factory=list)
    source: str = "these thresholds"  # for messages

    def put(self, entry: Threshold) -> None:
        """Adds an entry, in the place of one for the same adapter, dimension, scorer and number of enrolments."""
        self.entries = sorted(
            [other for other in self.entries if other.key != entry.key] + [entry],
            key=lambda each: (each.adapter or "", each.scorer, each.dim, each.enrolments),
        )

    def find(
        self,
        dim: int,
        adapter: str | None = None,
        scorer: object = "cosine",
        weights: str | None = None,
        enrolments: int = 1,
    ) -> Threshold:
        """The entry of a dimension and a number of averaged enrolment utterances.

        scorer: a `Scorer` or its `str()`. weights: of the model that answers now. Raises ValueError, naming what there
        is, without such an entry, and where it was set on other weights.
        """
        found = self.find_nearest(dim, adapter, scorer, weights, enrolments)
        if found.enrolments != enrolments:
            raise self._missing(adapter, dim, scorer, enrolments)
        return found

    def find_nearest(
        self,
        dim: int,
        adapter: str | None = None,
        scorer: object = "cosine",
        weights: str | None = None,
        enrolments: int = 1,
    ) -> Threshold:
        """As `find`; where there is no entry for `enrolments`, that of the next larger number, else of the largest.

        How many false accepts such an entry lets through is not known: whoever decides by it has to say so.
        """
        entries = {entry.enrolments: entry for entry in self.entries if entry.key[:3] == (adapter, dim, str(scorer))}
        if not entries:
            raise self._missing(adapter, dim, scorer, enrolments)
        entry = entries[min((number for number in entries if number >= enrolments), default=max(entries))]
        if weights is not None and not same_weights(entry.weights, weights):
            raise ValueError(
                f"{self.source}: the threshold for {entry} was set on other weights ({entry.weights}) than "
                f"those here ({weights}): set it again with `mrl-redimnet calibrate`"
            )
        return entry

    def _missing(self, *key: Any) -> ValueError:
        wanted = [str(part) for part in key]
        named = sorted(self.entries, key=lambda entry: sum(str(a) != b for a, b in zip(entry.key, wanted, strict=True)))
        more = f"; and {len(named) - _LISTED} more" if len(named) > _LISTED else ""
        there = "; ".join(map(str, named[:_LISTED])) + more or "none at all"
        return ValueError(
            f"{self.source}: no threshold for {_named(*key)}; there are: {there}. `mrl-redimnet calibrate` sets one, "
            "or give a threshold yourself (--threshold)"
        )

    def save(self, folder: str | Path) -> None:
        """Writes `folder`/thresholds.json, whole or not at all. Raises FileNotFoundError without the folder."""
        if not Path(folder).is_dir():
            raise FileNotFoundError(f"no folder {folder} to save {THRESHOLDS_FILE} in")
        content = {"version": VERSION, "entries": [asdict(entry) for entry in self.entries]}
        text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
        replace_text(Path(folder) / THRESHOLDS_FILE, text)

    @classmethod
    def load(cls, folder: str | Path) -> Self:
        """What `save` wrote. Fields that a later version adds are passed over.

        Raises FileNotFoundError without the file, ValueError naming file and entry where it is not what `save` writes.
        """
        file = Path(folder) / THRESHOLDS_FILE
        if not file.is_file():
            raise FileNotFoundError(f"no {file}: `mrl-redimnet calibrate` sets thresholds on labelled trials")
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
            version, records = content["version"], content["entries"]
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{file} does not hold thresholds: {error!r}") from error
        if version not in READABLE:
            readable = " and ".join(map(str, READABLE))
            raise ValueError(
                f"{file} has version {version!r}, this package reads {readable}: update it, or calibrate anew"
            )
        if not isinstance(records, list):
            raise ValueError(f"{file} does not hold thresholds: 'entries' is no list")
        found = cls(source=str(file))
        for number, record in enumerate(records, start=1):
            try:
                entry = _entry(record)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(f"{file}, entry {number}: not a threshold: {error}") from error
            if entry.key in [other.key for other in found.entries]:
                raise ValueError(f"{file}, entry {number}: a second one for {entry}")
            found.entries.append(entry)
        return found


def _logistic(columns: NDArray, targets: NDArray, prior: float) -> tuple[float, list[float]]:
    """Offset and slopes [F] of columns [T, F] that minimise the prior-weighted logistic loss."""
    with extra("evaluation"):  # fitting alone needs scipy, to use a threshold does not
        from scipy.optimize import minimize
        from scipy.special import expit, logit

    mean, scale = columns.mean(0), columns.std(0)
    constant = np.ptp(columns, axis=0) == 0  # durations all alike: their mean may round, their slope is to be 0
    mean[constant], scale[constant] = columns[0, constant], 1.0
    features = np.column_stack([np.ones(len(columns)), (columns - mean) / scale])
    weights = np.where(targets, prior / targets.sum(), (1 - prior) / (~targets).sum()) / min(prior, 1 - prior)
    signs = np.where(targets, 1.0, -1.0)  # and over the smaller prior: the loss is near 1 at any prior, as is the ridge
    ridge = np.full(features.shape[1], RIDGE)
    ridge[0] = 0.0

    def loss(solution: NDArray) -> tuple[float, NDArray]:
        margins = signs * (features @ solution + logit(prior))
        wrong = expit(-margins)
        value = weights @ np.logaddexp(0.0, -margins) + ridge @ solution**2 / 2
        return value, ridge * solution - features.T @ (weights * signs * wrong)

    def curvature(solution: NDArray) -> NDArray:
        chance = expit(features @ solution + logit(prior))
        return (features.T * (weights * chance * (1 - chance))) @ features + np.diag(ridge)

    # At the floor of rounding the method calls its last step a failure, so the gradient is what is judged.
    found = minimize(loss, np.zeros(len(ridge)), jac=True, hess=curvature, method="trust-exact", options={"gtol": 1e-9})
    if not np.abs(found.jac).max() < 1e-7:
        raise ValueError(f"the calibration did not converge on {len(columns)} trials: {found.message}")
    slopes = found.x[1:] / scale
    return float(found.x[0] - slopes @ mean), slopes.tolist()


def _logistic_of_seconds(
    scores: NDArray, logs: NDArray, targets: NDArray, prior: float
) -> tuple[float, tuple[float, float, float, float]]:
    """Offset, and slopes of the score, of the log durations [T, 2], and of the score times the first of these: 0 where
    the slope of the score would turn within the durations, as scores tell nothing at some of them.
    """
    first = logs[:, 0]
    middle = float(np.median(first))  # where durations are all alike, exactly theirs
    columns = np.column_stack([scores, logs])
    offset, (slope, shorter, longer, steeper) = _logistic(
        np.column_stack([columns, scores * (first - middle)]), targets, prior
    )
    slope -= steeper * middle
    if min(slope + steeper * logs.min(), slope + steeper * logs.max()) > 0:
        return offset, (slope, shorter, longer, steeper)
    offset, (slope, shorter, longer) = _logistic(columns, targets, prior)
    return offset, (slope, shorter, longer, 0.0)


def _log_seconds(
    seconds: ArrayLike, trials: int, limits: tuple[float, float] | None = None
) -> tuple[tuple[float, float], NDArray]:
    """Limits (by default, those of `seconds` [T, 2]) and ln durations [T, 2] inside them, the shorter side first."""
    seconds = np.asarray(seconds, dtype=np.float64)
    if seconds.shape != (trials, 2):
        raise ValueError(f"seconds must be those of both sides, shape ({trials}, 2), got {seconds.shape}")
    bad = ~((seconds > 0) & (seconds < np.inf))
    if bad.any():
        raise ValueError(f"{np.count_nonzero(bad)} durations are not positive and finite, first {seconds[bad][0]}")
    limits = limits or (float(seconds.min()), float(seconds.max()))
    return limits, np.log(np.sort(np.clip(seconds, *limits), axis=1))


def _checked(scores: ArrayLike, labels: ArrayLike) -> tuple[NDArray, NDArray]:
    """Scores as float64 [T] and labels as bool [T], or ValueError."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels)
    if scores.ndim != 1 or scores.shape != labels.shape:
        raise ValueError(f"scores and labels must be 1-D and of one length, got {scores.shape} and {labels.shape}")
    if not np.isin(labels, (0, 1)).all() or not np.isfinite(scores).all():
        raise ValueError("scores must be finite and labels 1 (target) or 0 (impostor)")
    targets = labels == 1
    if not targets.any() or targets.all():
        raise ValueError(f"{targets.sum()} targets and {(~targets).sum()} impostors: at least one of each is needed")
    return scores, targets


def _entry(record: dict) -> Threshold:
    """A threshold from what JSON holds of it; unknown fields are a later version's and not ours to judge."""
    if not isinstance(record, dict):
        raise ValueError(f"expected an object, got {record!r}")
    if not isinstance(record["calibration"], dict):
        raise ValueError(f"calibration: got {record['calibration']!r}")
    calibration = _known(Calibration, record["calibration"])
    if calibration.get("seconds") is not None:
        calibration["seconds"] = tuple(calibration["seconds"])
    return Threshold(**{**_known(Threshold, record), "calibration": Calibration(**calibration)})


def _known(kind: type, record: dict) -> dict:
    return {each.name: record[each.name] for each in fields(kind) if each.name in record}
