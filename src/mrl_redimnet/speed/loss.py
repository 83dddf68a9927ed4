"""The loss of all Matryoshka prefixes in one pass over the classifier's rows, for training on CPUs."""

from collections.abc import Callable
from typing import Any

import torch

from configuration_mrl_redimnet import MRLReDimNetConfig
from losses_mrl_redimnet import NORM_FLOOR, angular_gain, angular_margin, nearest_wrong
from modeling_mrl_redimnet import MatryoshkaMarginClassifier
from mrl_redimnet.speed.linear import runs_on_cpu

# Of logits [R, K, N]: losses [R, K], their slopes by the logits, and the sums of their slopes by each bias [K] or None.
Slopes = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]
CACHED_NUMBERS = 2**20  # of float32, a block of a matrix; half or twice as many take about as long


class FusedClassifier(MatryoshkaMarginClassifier):
    """`MatryoshkaMarginClassifier` that computes all prefixes together where it trains on a CPU."""

    def forward(
        self,
        embeddings: torch.Tensor,
        labels: torch.Tensor,
        margin: float | None = None,
        prefix_weights: list[float] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """As `MatryoshkaMarginClassifier.forward`, to rounding."""
        trains = torch.is_grad_enabled() and any(x.requires_grad for x in (embeddings, *self.parameters()))
        if not (trains and runs_on_cpu(embeddings)):
            return super().forward(embeddings, labels, margin, prefix_weights)
        margin = self.margin if margin is None else margin
        shares = self.shares(prefix_weights)
        used = [k for k, share in enumerate(shares) if share > 0]
        bias = None if self.bias is None else torch.stack([self.bias[k] for k in used]).float()

        def loss(logits: torch.Tensor, block: slice, bias: torch.Tensor | None) -> Slopes:
            own, gain = labels[block], self.gain(margin)
            slopes = SLOPES.get(self.config.loss, self._slopes_by_autograd)
            return _harder(
                lambda logits: slopes(logits, own, margin, self.scale, bias, self.config),
                logits, own, self.config.hard_negatives, gain, self.scale,
            )  # fmt: skip

        dims = [self.dims[k] for k in used]
        with torch.autocast(embeddings.device.type, enabled=False):
            total, losses, logits = PrefixLosses.apply(
                embeddings.float(), self.weight.float(), bias, loss, dims, [shares[k] for k in used], self.scale,
                self.config.sub_centers,
            )  # fmt: skip
            if shares[-1] == 0:
                logits = self.logits(embeddings).detach()
        if len(used) < len(shares):
            whole = losses.new_full((len(shares),), torch.nan)
            whole[used] = losses
            losses = whole
        return total, losses, logits

    def _slopes_by_autograd(
        self,
        logits: torch.Tensor,
        labels: torch.Tensor,
        margin: float,
        scale: float,
        bias: torch.Tensor | None,
        config: MRLReDimNetConfig,
    ) -> Slopes:
        """Losses [R, K] of logits [R, K, N]; their slopes by the logits, and the sums of those by each bias [K]."""

        def compute(logits: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
            rows = logits.flatten(0, 1)
            bias = None if bias is None else bias.repeat(len(logits))[:, None]
            own = labels.repeat_interleave(logits.shape[1])
            return self.loss.compute(rows, own, margin, scale, bias, config).view(logits.shape[:2])

        if bias is None:
            losses, slopes = _with_slope(compute, logits)
            return losses, slopes, None
        losses, slopes, bias_slopes = _with_slope(compute, logits, bias)
        return losses, slopes, bias_slopes


def _with_slope(curve: Callable[..., torch.Tensor], *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """curve(*inputs), and the gradient of its sum by each input; nothing of it in any graph around."""
    with torch.enable_grad():
        leaves = [value.detach().requires_grad_() for value in inputs]
        output = curve(*leaves)
        return output.detach(), *torch.autograd.grad(output.sum(), leaves)


def _harder(
    loss: Callable[[torch.Tensor], Slopes],
    logits: torch.Tensor,
    labels: torch.Tensor,
    count: int,
    margin: float,
    scale: float,
) -> Slopes:
    """loss(logits) -> losses, slopes, bias slopes, of the logits as `harder_negatives` changes them; the slopes are by
    those given.
    """
    nearest = nearest_wrong(logits, labels[:, None].expand(logits.shape[:2]), count)
    if nearest is None or margin == 0:
        return loss(logits)
    moved, rise = _with_slope(lambda x: scale * angular_gain(x / scale, margin), logits.gather(2, nearest))
    losses, slopes, bias_slopes = loss(logits.scatter(2, nearest, moved))
    return losses, slopes.scatter_(2, nearest, slopes.gather(2, nearest) * rise), bias_slopes


def aam_slopes(
    logits: torch.Tensor, labels: torch.Tensor, margin: float, scale: float, bias: None, config: MRLReDimNetConfig
) -> Slopes:
    """`aam_loss` of logits [R, K, N] with its slopes, by one exponential per logit; none is kept."""
    own, smoothing = labels[:, None, None].expand(-1, logits.shape[1], -1), config.label_smoothing
    plain = logits.gather(2, own)
    target, rise = _with_slope(lambda x: scale * angular_margin(x / scale, margin), plain)
    logits.scatter_(2, own, target)  # for a while: a copy would cost as much as the exponentials
    slopes = logits.softmax(2)
    # The largest probability is exp(largest logit - log sum); unlike the target's it never vanishes.
    log_sum = logits.amax(2) - slopes.amax(2).log_()
    losses = log_sum - (1.0 - smoothing) * target[:, :, 0]
    if smoothing:
        losses -= smoothing * logits.mean(2)
        slopes -= smoothing / logits.shape[2]
    logits.scatter_(2, own, plain)
    return losses, slopes.scatter_(2, own, (slopes.gather(2, own) - (1.0 - smoothing)) * rise), None


SLOPES = {"aam": aam_slopes}  # by config.loss; the others have autograd's


class PrefixLosses(torch.autograd.Function):
    """A loss of every prefix's scaled cosines, averaged over the batch, with all its gradients; for CPUs.

    For prefix k of embedding e and row w, x_k = a_k <e[:d_k], w[:d_k]> with a_k = s / |e[:d_k]| |w[:d_k]|. Let g_k be
    the loss's slope by x_k. Then segment j of the gradients (numbers d_(j-1) to d_j) is

        d e_j = sum over w of h_j w_j  -  e_j sum over w, k >= j of g_k x_k / |e[:d_k]|^2
        h_j = sum over k >= j of a_k g_k

    and d w_j alike, so all prefixes together cost the three matrix products of one full-width loss. Between the passes
    one tensor [B, K, rows] is kept: x in the forward pass, then, in its place, a g but for the rows' norms. Whatever
    else is of that kind exists for a block at a time that a processor's cache holds.
    """

    @staticmethod
    def forward(
        ctx: Any,
        embeddings: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        loss: Callable[[torch.Tensor, slice, torch.Tensor | None], Slopes],
        dims: list[int],
        shares: list[float],
        scale: float,
        centers: int,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Loss [], prefix losses [K], and the longest prefix's logits [B, N]; only the first has gradients.

        embeddings [B, D], weight [rows, D], both float32, bias [K] or None; dims [K]; shares [K] of the prefixes. loss:
        (logits [R, K, N], which rows of the batch as a slice, bias) -> `Slopes`, whose slopes are a new tensor.
        """
        x, e_norms, w_norms = scaled_cosines(embeddings, weight, dims, scale)
        batch, count, rows = x.shape
        logits = x.new_empty(batch, rows // centers)
        losses, e_pull = x.new_empty(batch, count), x.new_empty(batch, count)
        w_pull, bias_slopes = x.new_zeros(count, rows), x.new_zeros(count)
        for block in _blocks(batch, count * rows):
            part = x[block]
            nearest, center = (part, None) if centers == 1 else part.unflatten(2, (-1, centers)).max(3)
            logits[block] = nearest[:, -1]
            losses[block], slopes, bias_slope = loss(nearest, block, bias)
            if center is not None:
                spread = slopes.new_zeros(*slopes.shape, centers)
                slopes = spread.scatter_(3, center[..., None], slopes[..., None]).flatten(2)
            if bias is not None:
                bias_slopes += bias_slope
            part.mul_(slopes)
            e_pull[block] = part.sum(2)
            w_pull += part.sum(0)
            torch.mul(slopes, e_norms[block, :, None], out=part)
        parts = x.new_tensor(shares) / batch
        e_pull = _sums_from_here(e_pull * parts * (e_norms / scale).square(), 1)
        w_pull = _sums_from_here(w_pull * parts[:, None] * w_norms.square(), 0)
        ctx.dims = dims
        ctx.set_materialize_grads(False)  # the logits' would be as large as they are
        ctx.save_for_backward(embeddings, weight, x, w_norms * parts[:, None], e_pull, w_pull, bias_slopes * parts)
        prefix_losses = losses.mean(0)
        ctx.mark_non_differentiable(prefix_losses, logits)
        return (losses @ parts).sum(), prefix_losses, logits

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor, *_: None) -> tuple[torch.Tensor | None, ...]:
        """The gradients by embeddings, weight and bias, where they are needed."""
        embeddings, weight, slopes, w_norms, e_pull, w_pull, bias_slopes = ctx.saved_tensors
        needs_e, needs_w, needs_bias = ctx.needs_input_grad[:3]
        d_e, d_w = torch.zeros_like(embeddings), torch.empty_like(weight) if needs_w else None
        if d_w is not None:
            d_w[:, ctx.dims[-1] :] = 0.0
        scaled, w_pull = embeddings * gradient, w_pull * -gradient
        for block in _blocks(*weight.shape):
            h = weight.new_zeros(len(embeddings), len(weight[block]))
            for k, part in reversed(_segments(ctx.dims)):
                h.addcmul_(slopes[:, k, block], w_norms[k, block])
                if d_w is not None:
                    start = torch.mul(weight[block, part], w_pull[k, block, None], out=d_w[block, part])
                    start.addmm_(h.T, scaled[:, part])
                if needs_e:
                    d_e[:, part].addmm_(h, weight[block, part])
        for k, part in _segments(ctx.dims):
            d_e[:, part].addcmul_(embeddings[:, part], e_pull[:, k, None], value=-1.0)
        return d_e * gradient if needs_e else None, d_w, bias_slopes * gradient if needs_bias else None, *[None] * 5


def scaled_cosines(
    embeddings: torch.Tensor, weight: torch.Tensor, dims: list[int], scale: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """embeddings [B, D], weight [rows, D] -> scale * cosines of every prefix [B, K, rows], and their factors.

    The factors make these of dot products: scale / the embeddings' norms [B, K], 1 / the rows' norms [K, rows]. A
    prefix's dot products and squared norms are those of the one before plus one segment's.
    """
    e_norms = torch.stack([_squares(embeddings[:, part]) for _, part in _segments(dims)], 1)
    e_norms = e_norms.cumsum(1).add_(NORM_FLOOR**2).rsqrt_().mul_(scale)
    x, w_norms = weight.new_empty(*e_norms.shape, len(weight)), weight.new_empty(len(dims), len(weight))
    for block in _blocks(*weight.shape):
        dots, squares = weight.new_zeros(len(embeddings), len(weight[block])), 0.0
        for k, part in _segments(dims):
            dots.addmm_(embeddings[:, part], weight[block, part].T)
            squares = squares + _squares(weight[block, part])
            torch.rsqrt(squares + NORM_FLOOR**2, out=w_norms[k, block])
            torch.mul(dots, e_norms[:, k, None], out=x[:, k, block]).mul_(w_norms[k, block])
    return x, e_norms, w_norms


def _segments(dims: list[int]) -> list[tuple[int, slice]]:
    """Which numbers of an embedding each prefix adds to the one before."""
    return list(enumerate(map(slice, [0, *dims[:-1]], dims)))


def _squares(side: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(side, dim=1).square()  # no tensor of the side's size in between


def _sums_from_here(terms: torch.Tensor, dim: int) -> torch.Tensor:
    return terms.flip(dim).cumsum(dim).flip(dim)


def _blocks(count: int, width: int) -> list[slice]:
    """`count` rows of `width` numbers in slices that fit a CPU's cache."""
    size = max(1, CACHED_NUMBERS // width)
    return [slice(start, start + size) for start in range(0, count, size)]
