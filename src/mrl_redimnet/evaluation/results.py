"""Verification results at every Matryoshka dimension from one pass over the audio, and results of attributes."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, replace
from itertools import compress
from pathlib import Path

import numpy as np

from modeling_mrl_redimnet import MRLReDimNetPreTrainedModel
from mrl_redimnet.audio.io import AudioError
from mrl_redimnet.audio.waveforms import into_domain
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.rows import SHARES, AttributeRow, VerificationRow
from mrl_redimnet.scoring.metrics import bootstrap_interval, eer, mean_interval, min_dcf
from mrl_redimnet.scoring.scorers import score
from mrl_redimnet.scoring.trials import Trials, fitting_suffix, missing_utterances
from mrl_redimnet.tables import text_table

LISTED = 20  # missing files that a message names


def attribute_row(
    answers: np.ndarray, targets: np.ndarray, speakers: np.ndarray, classes: bool, resamples: int = 0
) -> AttributeRow:
    """Answers and targets [N] of utterances of `speakers` [N]: class ids, or numbers."""
    values = answers == targets if classes else np.abs(answers - targets)
    interval = mean_interval(values, speakers, resamples) if resamples else (None, None)
    return AttributeRow("accuracy" if classes else "mean absolute error", float(np.mean(values)), *interval)


def score_trials(
    trials: Trials, utterances: Sequence[str], embeddings: np.ndarray, dims: Sequence[int], resamples: int = 0
) -> list[VerificationRow]:
    """Results by cosine at each of `dims` from embeddings [N, D] of `utterances`.

    resamples: for the interval over speakers, 0 for none. Raises ValueError as `mrl_redimnet.scoring.scorers.score`
    does.
    """
    rows = []
    for dim in dims:
        scores, low, high = score(trials, utterances, embeddings, dim), None, None
        if resamples:
            low, high = bootstrap_interval(scores, trials.labels, *trials.speakers, resamples=resamples)
        rows.append(VerificationRow(dim, eer(scores, trials.labels), min_dcf(scores, trials.labels), low, high))
    return rows


def evaluate_trials(
    model: MRLReDimNetPreTrainedModel,
    trials: Trials,
    folder: str | Path,
    dims: Sequence[int] | None = None,
    resamples: int = 0,
    progress: str | None = None,
    domain: Callable | None = None,
    problems: dict[str, str] | None = None,
) -> list[VerificationRow]:
    """Embeds a trial list's utterances below `folder` once, and scores every dimension (default: the model's).

    domain: from `mrl_redimnet.audio.domains`, what the audio is made to sound like, each utterance always the same way.
    problems: where it is given, an utterance that cannot be read becomes an entry {path: message} there, and its trials
    are left out (`without`). Raises FileNotFoundError listing utterances that are not there; AudioError for one that
    cannot be read.
    """
    embeddings = embed_trials(model, trials, folder, progress, domain, problems)
    read = [row for row, path in enumerate(trials.utterances) if path not in (problems or ())]
    utterances, trials = [trials.utterances[row] for row in read], without(trials, problems or ())
    return score_trials(trials, utterances, embeddings[read], dims or model.config.matryoshka_dims, resamples)


def embed_trials(
    model: MRLReDimNetPreTrainedModel,
    trials: Trials,
    folder: str | Path,
    progress: str | None = None,
    domain: Callable | None = None,
    problems: dict[str, str] | None = None,
) -> np.ndarray:
    """Embeddings [N, D] of `trials.utterances`, for `score_trials`; arguments and errors as in `evaluate_trials`, the
    row of one that cannot be read is NaN.
    """
    check_present(trials, folder)
    files, encoder = [Path(folder) / path for path in trials.utterances], SpeakerEncoder(model)
    if problems is None:
        return encoder.embed(files, progress=progress, prepare=into_domain(folder, domain))
    found = encoder.embed_all(files, progress=progress, prepare=into_domain(folder, domain))
    problems.update({trials.utterances[row]: reason for row, reason in found.problems.items()})
    return found.embeddings


def without(trials: Trials, lost: Collection[str]) -> Trials:
    """The trials that need no utterance of `lost`; an enrolment of several goes on with those that are left.

    Raises AudioError where no target trial or no impostor trial is left.
    """
    if not lost:
        return trials
    models = trials.models
    if models is not None:
        models = {name: [path for path in paths if path not in lost] for name, paths in models.items()}
        models = {name: paths for name, paths in models.items() if paths}
    sides = zip(trials.enrol, trials.test, strict=True)
    kept = [b not in lost and (a not in lost if models is None else a in models) for a, b in sides]
    labels = trials.labels[kept]
    if len(set(labels.tolist())) < len(set(trials.labels.tolist())):
        raise AudioError(
            f"without {len(lost):,} utterances that cannot be read (first {sorted(lost)[0]}) there are no target "
            "trials, or no impostor trials, left: copy or encode the files again"
        )
    enrol, test = ([*compress(side, kept)] for side in (trials.enrol, trials.test))
    if models is not None:
        models = {name: models[name] for name in dict.fromkeys(enrol)}
    return replace(trials, labels=labels, enrol=enrol, test=test, models=models)


def check_present(trials: Trials, folder: str | Path) -> None:
    """Raises FileNotFoundError listing utterances of the trials that are not below `folder`."""
    missing = missing_utterances(trials, folder)
    if missing:
        rest = f" and {len(missing) - LISTED} more" if len(missing) > LISTED else ""
        suffix = fitting_suffix(missing, folder)
        hint = (
            f". With the suffix {suffix} they are there: give --suffix {suffix} (in a recipe's test `suffix: {suffix}`)"
        )
        raise FileNotFoundError(
            f"{len(missing)} of the trial list's {len(trials.utterances)} utterances are not below {folder}: "
            + ", ".join(missing[:LISTED])
            + rest
            + (hint if suffix else "")
        )


def format_table(tables: dict[str, list[VerificationRow] | list[AttributeRow]]) -> str:
    """Named results as text: one line per name; of verification, a column per dimension."""
    attributes = [
        [name, _attribute(row)] for name, rows in tables.items() for row in rows if isinstance(row, AttributeRow)
    ]
    if attributes:
        return text_table(attributes, left=(0, 1))
    lines: list[list[str]] = []
    for name, rows in tables.items():
        verification = [row for row in rows if isinstance(row, VerificationRow)]
        if not lines:
            lines.append(["", *(f"{row.dim} dims" for row in verification), ""])
        lines.append([name, *(_percent(row.eer, row.eer_low, row.eer_high) for row in verification), "EER %"])
        lines.append(["", *(f"{row.min_dcf:.3f}" for row in verification), "minDCF (p 0.01)"])
    return text_table(lines, left=(0, len(lines[0]) - 1))


def _percent(value: float, low: float | None, high: float | None) -> str:
    interval = "" if low is None or high is None else f" [{100 * low:.1f}, {100 * high:.1f}]"
    return f"{100 * value:.2f}{interval}"


def _attribute(row: AttributeRow) -> str:
    if row.metric in SHARES:
        return f"{_percent(row.value, row.low, row.high)}   {row.metric} %"
    interval = "" if row.low is None else f" [{row.low:.2f}, {row.high:.2f}]"
    return f"{row.value:.2f}{interval}   {row.metric}"


def as_records(rows: list[VerificationRow] | list[AttributeRow]) -> list[dict]:
    """Rows as plain dictionaries, for JSON."""
    return [asdict(row) for row in rows]
