"""actDCF of verification trials: `evaluate.load("./metrics/act_dcf")`, with mrl-redimnet installed."""

from numpy.typing import ArrayLike

from mrl_redimnet.evaluation import evaluate_module as evaluate_metric
from mrl_redimnet.scoring import metrics


class ActDcf(evaluate_metric.TrialMetric):
    """Normalised detection cost of decisions at the Bayes threshold; results `act_dcf_PRIOR`.

    The predictions are natural-log likelihood ratios.
    Options: `priors` of a target trial [0.01], `c_miss` [1] and `c_fa` [1], the costs of an error.
    """

    def measures(self, priors: ArrayLike = (0.01,), c_miss: float = 1.0, c_fa: float = 1.0) -> evaluate_metric.Measures:
        """`metrics.act_dcf` at each prior. Raises ValueError for no prior, and for one that comes twice."""
        return evaluate_metric.per_prior(metrics.act_dcf, "act_dcf", priors, c_miss, c_fa)
