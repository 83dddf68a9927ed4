"""actDCF of verification trials: `evaluate.load("./metrics/act_dcf")`, with mrl-redimnet installed."""

from mrl_redimnet.evaluation import evaluate_module as evaluate_metric
from mrl_redimnet.scoring import metrics


class ActDcf(evaluate_metric.TrialMetric):
    """Normalised detection cost of decisions at the Bayes threshold; results `act_dcf_PRIOR`.

    The predictions are natural-log likelihood ratios.
    Options: `priors` of a target trial [0.01], `c_miss` [1] and `c_fa` [1], the costs of an error.
    """

    def measures(self, priors=(0.01,), c_miss=1.0, c_fa=1.0):
        return evaluate_metric.per_prior(metrics.act_dcf, "act_dcf", priors, c_miss, c_fa)
