"""What `mrl-redimnet evaluate` measures of scored trial lists, and the form it is kept in.

The form (`evaluate --json`, and evaluation.json of a page) is one object:

    conditions  what was evaluated and how: command, model, weights (fingerprint), adapter, domain, scoring, priors,
                resamples, version
    lists       {name: {"trials", "targets", "utterances", "speakers": counts,
                        "rows": [one per dimension],
                        "groups": [rows of `groups.error_rates`, where groups were asked for]}}

A row holds "dim", every measure of `measures` by its name, its 95 % interval from a bootstrap over speakers as NAME_low
and NAME_high, "eer_threshold" (the score at which misses and false alarms are equally frequent), and "saved": what
the threshold saved beside the model does on this list, None without one. Rates are in [0, 1].
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial

import numpy as np

from mrl_redimnet.evaluation.groups import eer_threshold, error_rates
from mrl_redimnet.scoring.calibration import Threshold
from mrl_redimnet.scoring.metrics import (
    act_dcf,
    auc,
    bootstrap_together,
    cllr,
    eer,
    eer_convex_hull,
    min_cllr,
    min_dcf,
    quantile_interval,
)
from mrl_redimnet.scoring.trials import Trials, UnknownSpeakersError


@dataclass(frozen=True)
class Measure:
    """metric(scores, labels, weights=None) -> float; percent: it is a rate, shown times 100; of_llrs: it takes
    log likelihood ratios for scores.
    """

    title: str
    metric: Callable[..., float]
    percent: bool = False
    of_llrs: bool = False

    def cell(self, row: dict, name: str) -> str:
        """The value of `name` in a row of a report, with its interval if there is one, as tables show it."""
        unit, digits = (100, 2) if self.percent else (1, 3)
        value = f"{unit * row[name]:.{digits}f}"
        if f"{name}_low" not in row:
            return value
        return f"{value} [{unit * row[f'{name}_low']:.{digits - 1}f}, {unit * row[f'{name}_high']:.{digits - 1}f}]"


def measures(priors: Sequence[float]) -> dict[str, Measure]:
    """All that is measured, by the names in the JSON. priors: of a target, for the detection costs."""
    return {
        "eer": Measure("EER %", eer, percent=True),
        **{f"min_dcf_{p:g}": Measure(f"minDCF {p:g}", partial(min_dcf, p_target=p)) for p in priors},
        "eer_convex_hull": Measure("EER % (convex hull)", eer_convex_hull, percent=True),
        "auc": Measure("AUC", auc),
        "min_cllr": Measure("min Cllr", min_cllr),
        "cllr": Measure("Cllr", cllr, of_llrs=True),
        **{f"act_dcf_{p:g}": Measure(f"actDCF {p:g}", partial(act_dcf, p_target=p), of_llrs=True) for p in priors},
    }


@dataclass(frozen=True)
class ScoredList:
    """One trial list with its scores at every dimension, {dim: [trials] float64}.

    saved: the thresholds saved beside the model, by dimension. seconds: [trials, 2] of both sides, where one of them
    has duration terms.
    """

    trials: Trials
    scores: dict[int, np.ndarray]
    saved: dict[int, Threshold] = field(default_factory=dict)
    seconds: np.ndarray | None = None

    def counts(self) -> dict[str, int | None]:
        """How large the list is; None speakers where it does not tell them."""
        try:
            speakers = len({*np.concatenate(self.trials.speakers)})
        except UnknownSpeakersError:
            speakers = None
        return {
            "trials": len(self.trials),
            "targets": int(np.sum(self.trials.labels)),
            "utterances": len(self.trials.utterances),
            "speakers": speakers,
        }

    def row(self, dim: int, priors: Sequence[float], resamples: int) -> dict:
        """All measures at one dimension, as a row of the report.

        resamples: of the intervals over speakers, 0 for none. Measures of likelihood ratios need a saved calibration.
        """
        row: dict = {"dim": dim, "eer_threshold": eer_threshold(self.scores[dim], self.trials.labels), "saved": None}
        llrs = None
        if dim in self.saved:
            accepted, llrs = self.saved[dim].judge(self.scores[dim], self.seconds)
            row["saved"] = self._applied(self.saved[dim], accepted)
        for values, of_llrs in ((self.scores[dim], False), (llrs, True)):
            if values is not None:
                metrics = {name: m.metric for name, m in measures(priors).items() if m.of_llrs == of_llrs}
                row |= self._measured(values, metrics, resamples)
        return row

    def _measured(self, values: np.ndarray, metrics: dict[str, Callable[..., float]], resamples: int) -> dict:
        row = {name: metric(values, self.trials.labels) for name, metric in metrics.items()}
        if resamples:
            trials = values, self.trials.labels, *self.trials.speakers
            for name, drawn in bootstrap_together(*trials, metrics, resamples).items():
                row[f"{name}_low"], row[f"{name}_high"] = quantile_interval(drawn)
        return row

    def groups(self, group_of: Mapping[str, str], resamples: int) -> list[dict]:
        """Rows of `groups.error_rates` at every dimension, at its saved threshold or that of equal error rates; of
        LLRs where the saved threshold is one.
        """
        rows = []
        for dim, scores in self.scores.items():
            saved = self.saved.get(dim)
            if saved is not None and saved.calibration.uses_seconds:
                scores = saved.calibration(scores, self.seconds)
            threshold = None if saved is None else saved.threshold
            rows += error_rates(self.trials, scores, group_of, resamples, threshold, dim)
        return [asdict(row) for row in rows]

    def _applied(self, saved: Threshold, accepted: np.ndarray) -> dict:
        targets = self.trials.labels == 1
        return {
            "threshold": saved.threshold,
            "of_llrs": saved.calibration.uses_seconds,  # else of scores
            "wanted_false_accepts": saved.wanted,
            "set_on": saved.trials,
            "enrolments": saved.enrolments,
            "false_accepts": float(accepted[~targets].mean()),
            "misses": float(1 - accepted[targets].mean()),
        }
