"""minimum Cllr of verification trials: `evaluate.load("./metrics/min_cllr")`, with mrl-redimnet installed."""

from mrl_redimnet.evaluation import evaluate_module as evaluate_metric
from mrl_redimnet.scoring import metrics


class MinCllr(evaluate_metric.TrialMetric):
    """Cllr after the best rising calibration of the scores, in [0, 1] bits."""

    def measures(self) -> evaluate_metric.Measures:
        """`metrics.min_cllr`; no options."""
        return {"min_cllr": metrics.min_cllr}
