"""AUC of verification trials: `evaluate.load("./metrics/auc")`, with mrl-redimnet installed."""

from mrl_redimnet import evaluate_metric, metrics


class Auc(evaluate_metric.TrialMetric):
    """Area under the ROC, in [0, 1]: the probability that a target scores above an impostor, ties counting half."""

    def measures(self):
        return {"auc": metrics.auc}
