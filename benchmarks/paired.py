"""EERs with their bootstrap over speakers, to be averaged over seeds and subtracted between systems.

Every system of a trial list sees the same resamples of the speakers, so the interval of a difference is a paired one.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mrl_redimnet.scoring.metrics import bootstrap_values, eer, quantile_interval
from mrl_redimnet.scoring.scorers import score
from mrl_redimnet.scoring.trials import Trials


@dataclass(frozen=True)
class Drawn:
    """A number, and what it is in every resample, [resamples]."""

    value: float
    values: np.ndarray

    def __sub__(self, other: "Drawn") -> "Drawn":
        return Drawn(self.value - other.value, self.values - other.values)

    @property
    def interval(self) -> tuple[float, float]:
        """Of 95 %."""
        return quantile_interval(self.values)

    @property
    def beyond_noise(self) -> bool:
        """Whether the interval leaves out zero."""
        low, high = self.interval
        return low * high > 0

    def record(self) -> dict[str, float]:
        """For JSON."""
        low, high = self.interval
        return {"value": self.value, "low": low, "high": high}


def mean(drawn: Iterable[Drawn]) -> Drawn:
    """The mean of numbers drawn from the same resamples, such as several seeds'."""
    drawn = list(drawn)
    return Drawn(float(np.mean([d.value for d in drawn])), np.mean([d.values for d in drawn], axis=0))


def averaged(found: Sequence[dict]) -> dict:
    """{key: the mean over `found`, dictionaries of drawn numbers with the same keys}: over seeds, mostly."""
    return {key: mean(of[key] for of in found) for key in found[0]}


def eers(trials: Trials, utterances: Sequence[str], embeddings: np.ndarray, dims: Sequence[int], resamples: int):
    """The EER of embeddings [N, D] of `utterances` at each of `dims`: {dim: Drawn}."""
    found = {}
    for dim in dims:
        scores = score(trials, utterances, embeddings, dim)
        values = bootstrap_values(scores, trials.labels, *trials.speakers, resamples=resamples)
        found[dim] = Drawn(eer(scores, trials.labels), values)
    return found


def percent(drawn: Drawn) -> str:
    """A rate for a table: per cent with its interval."""
    low, high = drawn.interval
    return f"{100 * drawn.value:.2f} [{100 * low:.1f}, {100 * high:.1f}]"


def change(drawn: Drawn) -> str:
    """A difference of rates for a table: points with their interval, bold where that leaves out zero."""
    low, high = drawn.interval
    text = f"{100 * drawn.value:+.2f} [{100 * low:+.1f}, {100 * high:+.1f}]"
    return f"**{text}**" if drawn.beyond_noise else text
