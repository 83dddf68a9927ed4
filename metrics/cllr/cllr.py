"""Cllr of verification trials: `evaluate.load("./metrics/cllr")`, with mrl-redimnet installed."""

from mrl_redimnet.evaluation import evaluate_module as evaluate_metric
from mrl_redimnet.scoring import metrics


class Cllr(evaluate_metric.TrialMetric):
    """Cost of log-likelihood ratios, in bits; the predictions are natural-log likelihood ratios."""

    def measures(self) -> evaluate_metric.Measures:
        """`metrics.cllr`; no options."""
        return {"cllr": metrics.cllr}
