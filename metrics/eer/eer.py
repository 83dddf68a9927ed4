"""EER of verification trials: `evaluate.load("./metrics/eer")`, with mrl-redimnet installed."""

from collections.abc import Sequence

from mrl_redimnet.evaluation import evaluate_module as evaluate_metric
from mrl_redimnet.scoring import metrics


class Eer(evaluate_metric.TrialMetric):
    """Equal error rate, in [0, 1].

    Option `methods`: "interpolated" gives `eer`, of the ROC joined by straight lines; "convex_hull" gives
    `eer_convex_hull`, of the ROC's convex hull. Both by default.
    """

    def measures(self, methods: str | Sequence[str] = ("interpolated", "convex_hull")) -> evaluate_metric.Measures:
        """The equal error rate by each method. Raises ValueError for no method, and for an unknown one."""
        known = {
            "interpolated": ("eer", metrics.eer),
            "convex_hull": ("eer_convex_hull", metrics.eer_convex_hull),
        }
        wanted = [methods] if isinstance(methods, str) else list(methods)
        if not wanted or set(wanted) - set(known):
            raise ValueError(f"methods: got {wanted}, expected some of {', '.join(known)}")
        return dict(known[method] for method in wanted)
