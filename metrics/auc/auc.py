"""AUC of verification trials: `evaluate.load("./metrics/auc")`, with mrl-redimnet installed."""

from mrl_redimnet.evaluation import evaluate_module as evaluate_metric
from mrl_redimnet.scoring import metrics


class Auc(evaluate_metric.TrialMetric):
    """Area under the ROC, in [0, 1]: the probability that a target scores above an impostor, ties counting half."""

    def measures(self) -> evaluate_metric.Measures:
        """`metrics.auc`; no options."""
        return {"auc": metrics.auc}
