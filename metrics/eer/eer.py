"""EER of verification trials: `evaluate.load("./metrics/eer")`, with mrl-redimnet installed."""

from mrl_redimnet.evaluation import evaluate_module as evaluate_metric
from mrl_redimnet.scoring import metrics


class Eer(evaluate_metric.TrialMetric):
    """Equal error rate, in [0, 1].

    Option `methods`: "interpolated" gives `eer`, of the ROC joined by straight lines; "convex_hull" gives
    `eer_convex_hull`, of the ROC's convex hull. Both by default.
    """

    def measures(self, methods=("interpolated", "convex_hull")):
        known = {
            "interpolated": ("eer", metrics.eer),
            "convex_hull": ("eer_convex_hull", metrics.eer_convex_hull),
        }
        methods = [methods] if isinstance(methods, str) else list(methods)
        if not methods or set(methods) - set(known):
            raise ValueError(f"methods: got {methods}, expected some of {', '.join(known)}")
        return dict(known[method] for method in methods)
