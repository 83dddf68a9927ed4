"""What the `evaluate` modules of the folder `metrics` share: columns of trials, options, intervals over speakers.

A module is a subclass of `TrialMetric` that names its measures; see `metrics/eer/eer.py`.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import ArrayLike

from mrl_redimnet.extras import extra
from mrl_redimnet.scoring.metrics import bootstrap_together, quantile_interval

with extra("evaluation"):
    import datasets
    import evaluate
    from datasets.features.features import cast_to_python_objects

Measures = dict[str, Callable[..., float]]  # {name of a result: f(scores, labels, weights=None)}
SPEAKERS = ("enrol_speakers", "test_speakers")
# Configurations, and what type of speaker columns they take.
CONFIGS = {"default": None, "speakers": "string", "speaker_ids": "int64"}

INPUTS = """
Args:
    predictions: [trials] scores, higher means more alike; kept as float64. NaN is refused.
    references: [trials] 1 for a target trial (one speaker), 0 for an impostor trial.
    enrol_speakers, test_speakers: [trials] speaker of each side; columns of the configurations "speakers" (names) and
        "speaker_ids" (whole numbers), which add an interval over speakers to every result.
    resamples [1000], confidence [0.95], seed [0]: of these intervals.
"""


class TrialMetric(evaluate.Metric, ABC):
    """A metric of verification trials.

    The results hold each measure under its name and, where the configuration has speakers, NAME_low and NAME_high.
    Options of the measures and of the intervals are given to `compute`, or as defaults to `evaluate.load`.
    """

    def __init__(self, *arguments: Any, **keywords: Any) -> None:
        known = inspect.signature(evaluate.Metric.__init__).parameters
        # evaluate drops keywords that it does not know: a misspelt option would be lost without a word
        self.options = {name: keywords.pop(name) for name in list(keywords) if name not in known}
        super().__init__(*arguments, **keywords)
        if keywords.get("seed") is not None and CONFIGS[self.config_name]:
            self.options["seed"] = keywords["seed"]  # evaluate knows this one, but not what for
        self._measures_and_interval(self.options)

    @abstractmethod
    def measures(self, **options: Any) -> Measures:
        """The functions of the module's results, by name; its keywords are the options of the module."""

    def _info(self) -> evaluate.MetricInfo:
        if self.config_name not in CONFIGS:
            raise ValueError(f"configuration {self.config_name!r}: expected one of {', '.join(CONFIGS)}")
        columns = {name: datasets.Value("float64") for name in ("predictions", "references")}
        if dtype := CONFIGS[self.config_name]:
            columns |= {name: datasets.Value(dtype) for name in SPEAKERS}
        return evaluate.MetricInfo(
            description=inspect.getdoc(type(self)) or "",
            citation="",
            inputs_description=INPUTS,
            features=TrialFeatures(columns),
            format="arrow",  # "numpy" would round to float32, and none at all make lists of Python numbers
        )

    def _compute(
        self,
        *,
        predictions: ArrayLike,
        references: ArrayLike,
        enrol_speakers: pa.ChunkedArray | None = None,
        test_speakers: pa.ChunkedArray | None = None,
        **options: Any,
    ) -> dict[str, float]:
        measures, interval = self._measures_and_interval({**self.options, **options})
        scores, labels = np.asarray(predictions), np.asarray(references)
        results = {name: metric(scores, labels) for name, metric in measures.items()}
        if enrol_speakers is not None:
            enrol, test = map(_speaker_array, SPEAKERS, (enrol_speakers, test_speakers))
            confidence = interval.pop("confidence", 0.95)
            for name, values in bootstrap_together(scores, labels, enrol, test, measures, **interval).items():
                results[f"{name}_low"], results[f"{name}_high"] = quantile_interval(values, confidence)
        return results

    def _measures_and_interval(self, options: dict) -> tuple[Measures, dict]:
        """The measures, and the settings of the interval; ValueError for an option that neither of them has."""
        of_interval = ("resamples", "confidence", "seed")
        interval = {name: value for name, value in options.items() if name in of_interval}
        if interval and CONFIGS[self.config_name] is None:
            raise ValueError(
                f"{', '.join(interval)}: there are no intervals without speakers; "
                'load the configuration "speakers" or "speaker_ids"'
            )
        rest = {name: value for name, value in options.items() if name not in interval}
        known = inspect.signature(self.measures).parameters
        if unknown := sorted(set(rest) - set(known)):
            expected = ", ".join([*known, *of_interval])
            raise ValueError(f"{self.name}: unknown option {', '.join(unknown)}; its options: {expected}")
        return self.measures(**rest), interval


class TrialFeatures(datasets.Features):
    """Columns of numbers that are taken over as arrays; the base class converts them number by number."""

    def encode_batch(self, batch: dict) -> dict:
        """batch: column name -> [trials] values, as a list, array or tensor -> what Arrow takes whole."""
        encoded = {name: cast_to_python_objects(column) for name, column in batch.items()}  # tensors to arrays
        for name in ("predictions", "references"):
            encoded[name] = np.asarray(encoded[name], dtype=np.float64)
            if encoded[name].ndim != 1:
                raise ValueError(f"{name} must be a column [trials], got shape {encoded[name].shape}")
        return encoded


def per_prior(metric: Callable[..., float], name: str, priors: ArrayLike, c_miss: float, c_fa: float) -> Measures:
    """Measures "NAME_PRIOR", as min_dcf_0.01, of a metric with the keywords p_target, c_miss and c_fa.

    priors: a number or several. Raises ValueError for none, and for one that comes twice.
    """
    different = [float(prior) for prior in np.atleast_1d(priors)]
    if not different or len(set(different)) < len(different):
        raise ValueError(f"priors must be one or more different probabilities of a target trial, got {different}")
    costs = {"c_miss": c_miss, "c_fa": c_fa}
    return {f"{name}_{prior}": partial(metric, p_target=prior, **costs) for prior in different}


def _speaker_array(name: str, column: pa.ChunkedArray) -> np.ndarray:
    if column.null_count:
        raise ValueError(f"{name}: {column.null_count} of {len(column)} trials have no speaker")
    array = column.to_numpy()
    return array.astype(np.str_) if array.dtype == object else array
