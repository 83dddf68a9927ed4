"""Checks that a classifier is set up right, and that it learns."""

from dataclasses import dataclass

import torch

from modeling_mrl_redimnet import MatryoshkaMarginClassifier


@torch.no_grad()
def chance_loss(
    classifier: MatryoshkaMarginClassifier, margin: float, crops: int = 64, prefix_weights: list[float] | None = None
) -> tuple[float, float]:
    """The loss of `crops` embeddings that know nothing, mean and standard deviation over random directions and labels.

    For N speakers, prefix d, scale s and margin m AAM's is about ln N + s^2 / (2 d) + s sin m; it is measured here with
    the classifier's own rows, because the second term holds only where N is large. All of a batch point one way, as
    an untrained network's embeddings do.
    """
    generator = torch.Generator().manual_seed(2**31)  # a small seed's directions may be those the rows began with
    device = classifier.weight.device
    speakers, width = classifier.num_speakers, classifier.weight.shape[1]
    losses = []
    for _ in range(64):
        direction = torch.randn(1, width, generator=generator).expand(crops, width)
        labels = torch.randint(speakers, (crops,), generator=generator)
        losses.append(classifier(direction.to(device), labels.to(device), margin, prefix_weights)[0])
    return float(torch.stack(losses).mean()), float(torch.stack(losses).std())


@dataclass
class ChanceGuard:
    """Stops a run whose classifier is not set up right, or does not learn.

    mean, deviation: of the loss at chance level; deadline: the step by which the loss must be below. fresh: whether
    all rows of the classifier are new, none of an earlier model.
    """

    mean: float
    deviation: float
    deadline: float
    fresh: bool = True

    def check_start(self, loss: float) -> str | None:
        """At the first step of a fresh classifier the loss is chance level, within 5 % (or what chance explains).

        With rows of an earlier model it is to be below; where it is not, a sentence says what that may mean.
        """
        if not self.fresh:
            if loss < self.mean:
                return None
            return (
                f"the first loss is {loss:.2f}, a classifier that knows nothing has {self.mean:.2f}, although rows "
                "were taken over: they may be those of other people with the same names. reuse_classifier: false "
                "begins without them."
            )
        if not abs(loss - self.mean) <= max(0.05 * self.mean, 4 * self.deviation):  # nor is it NaN
            raise RuntimeError(
                f"The first loss is {loss:.2f}, a fresh classifier's is {self.mean:.2f} +- {self.deviation:.2f}: "
                "labels, scale or normalisation of the loss are not what they should be."
            )
        return None

    def check_progress(self, step: int, loss: float, margin_cost: float = 0.0) -> None:
        """From the deadline on the loss must have left chance level, which a margin raises."""
        chance = self.mean + margin_cost
        if step >= self.deadline and not loss <= 0.95 * chance:  # nor is it NaN
            raise RuntimeError(
                f"After {step} steps the loss is {loss:.2f}, not below chance level ({chance:.2f}): nothing is "
                "being learnt. Check the labels, the learning rate and the audio (chance_until moves this check)."
            )
