import math

import pytest
import torch
import torch.nn.functional as F
from conftest import padded, relative_error, tiny_config, tiny_model, waves
from hypothesis import given
from hypothesis import strategies as st

from losses_mrl_redimnet import LOSSES, angular_gain, angular_margin, sphereface2_similarity
from modeling_mrl_redimnet import MatryoshkaMarginClassifier, MRLReDimNetForXVector
from mrl_redimnet.speed import speed_up
from mrl_redimnet.speed.loss import SLOPES, PrefixLosses
from mrl_redimnet.training.guards import chance_loss

LABELS = torch.tensor([0, 4, 1, 1, 2, 3])
SPHEREFACE2 = dict(loss="sphereface2")
# Every loss, with and without what can be combined with it.
KINDS = {
    "aam": {},
    "aam_smoothed": dict(label_smoothing=0.1),
    "aam_sub_centers": dict(sub_centers=3),
    "aam_hard_negatives": dict(hard_negatives=2, hard_negative_margin=0.1),
    "aam_all": dict(sub_centers=2, hard_negatives=3, label_smoothing=0.1, scale=8.0),
    "sphereface2": SPHEREFACE2,
    "sphereface2_all": dict(**SPHEREFACE2, sub_centers=2, hard_negatives=2, sphereface2_balance=0.4, scale=10.0),
    "sphereface2_exponent": dict(**SPHEREFACE2, sphereface2_exponent=1.7),
}


@pytest.fixture(params=[True, False], ids=["fused", "defined"])
def each_path(request, monkeypatch) -> bool:
    """The classifier that computes all prefixes together (true), and the definition."""
    monkeypatch.setitem(FUSED, "on", request.param)
    return request.param


FUSED = {"on": False}


def margin_classifier(**changes) -> MatryoshkaMarginClassifier:
    torch.manual_seed(3)
    classifier = MatryoshkaMarginClassifier(tiny_config(**changes))
    return speed_up(classifier) if FUSED["on"] else classifier


# ----------------------------------------------------------------------------------------------------------------------
# Against plain loops in float64, as papers write them


def oracle(classifier, embeddings, labels, margin) -> torch.Tensor:
    """Each prefix's loss [len(dims)]: slice, normalise, the formula, utterance by utterance."""
    config = classifier.config
    formula = {"aam": aam_oracle, "sphereface2": sphereface2_oracle}[config.loss]
    weight = classifier.weight.double().unflatten(0, (-1, config.sub_centers))
    losses = []
    for index, dim in enumerate(classifier.dims):
        rows = []
        for embedding, label in zip(embeddings.double(), labels.tolist(), strict=True):
            direction = embedding[:dim] / embedding[:dim].norm()
            cosines = [max(row[:dim] / row[:dim].norm() @ direction for row in rows_of) for rows_of in weight]
            wrong = sorted((s for s in range(len(cosines)) if s != label), key=lambda s: -cosines[s])
            for speaker in wrong[: config.hard_negatives]:
                theta = torch.acos(cosines[speaker])
                assert theta > config.hard_negative_margin  # the formula's own range
                cosines[speaker] = torch.cos(theta - config.hard_negative_margin)
            bias = None if classifier.bias is None else classifier.bias.double()[index]
            rows.append(formula(cosines, label, margin, bias, config))
        losses.append(torch.stack(rows).mean())
    return torch.stack(losses)


def aam_oracle(cosines, label, margin, bias, config):
    theta = torch.acos(cosines[label])
    target = torch.cos(theta + margin) if theta + margin < math.pi else cosines[label] - margin * math.sin(margin)
    logits = [target if speaker == label else cosine for speaker, cosine in enumerate(cosines)]
    log_p = F.log_softmax(config.scale * torch.stack(logits), dim=0)
    return -(1 - config.label_smoothing) * log_p[label] - config.label_smoothing * log_p.mean()


def sphereface2_oracle(cosines, label, margin, bias, config):
    loss, share = 0.0, config.sphereface2_balance
    for speaker, cosine in enumerate(cosines):
        g = 2 * ((cosine + 1) / 2) ** config.sphereface2_exponent - 1
        if speaker == label:
            loss = loss + share * torch.log(1 + torch.exp(-(config.scale * (g - margin) + bias)))
        else:
            loss = loss + (1 - share) * torch.log(1 + torch.exp(config.scale * (g + margin) + bias))
    return loss


@pytest.mark.parametrize("margin", [0.0, 0.2, 0.5, 1.4])
@pytest.mark.parametrize("prefix_weights", [[1, 1, 1], [1, 2, 5]])
@pytest.mark.parametrize("kind", KINDS)
def test_losses_and_gradients_against_plain_loops(kind, prefix_weights, margin, each_path):
    classifier = margin_classifier(margin=margin, prefix_weights=prefix_weights, **KINDS[kind])
    embeddings = torch.randn(6, 32)
    embeddings[0] = -3 * classifier.weight[0].detach() + 0.1 * torch.randn(32)  # its angle and a margin exceed pi
    embeddings.requires_grad_()
    if classifier.bias is not None:
        classifier.bias.data += torch.tensor([0.5, -1.0, 2.0])  # each prefix has its own
    loss, prefix_losses, _ = classifier(embeddings, LABELS)
    weights = torch.tensor(prefix_weights, dtype=torch.float64)
    expected = oracle(classifier, embeddings, LABELS, margin)
    torch.testing.assert_close(prefix_losses, expected.float().detach(), rtol=1e-4, atol=1e-5)
    total = (expected * weights).sum() / weights.sum()
    torch.testing.assert_close(loss, total.float(), rtol=1e-4, atol=1e-5)
    inputs = (embeddings, *classifier.parameters())
    for ours, theirs in zip(torch.autograd.grad(loss, inputs), torch.autograd.grad(total, inputs), strict=True):
        assert relative_error(ours, theirs) < 1e-4


def plainly(classifier, embeddings, labels, margin, shares):
    """What the classifier gives and its gradients, by autograd in float64, prefix by prefix on whole matrices."""
    config, inputs = classifier.config, [t.detach().double().requires_grad_() for t in classifier.parameters()]
    embeddings = embeddings.detach().double().requires_grad_()
    weight, bias, losses = inputs[0], inputs[-1], []
    mine = F.one_hot(labels, classifier.num_speakers).bool()
    for index, dim in enumerate(classifier.dims):
        e, w = (F.normalize(side[:, :dim], dim=1) for side in (embeddings, weight))
        cosine = (e @ w.T).unflatten(1, (-1, config.sub_centers)).amax(2)
        logits = config.scale * cosine
        if config.hard_negatives and margin and cosine.shape[1] > 1:
            count = min(config.hard_negatives, cosine.shape[1] - 1)
            nearest = cosine.masked_fill(mine, -torch.inf).topk(count, dim=1).indices
            gained = angular_gain(cosine, config.hard_negative_margin * margin / config.margin)
            cosine = torch.where(torch.zeros_like(mine).scatter(1, nearest, True), gained, cosine)
        if config.loss == "aam":
            moved = torch.where(mine, angular_margin(cosine, margin), cosine)
            losses.append(F.cross_entropy(config.scale * moved, labels, label_smoothing=config.label_smoothing))
        else:
            similarity = sphereface2_similarity(cosine, config.sphereface2_exponent)
            right = F.softplus(-config.scale * (similarity - margin) - bias[index]) * config.sphereface2_balance
            wrong = F.softplus(config.scale * (similarity + margin) + bias[index]) * (1 - config.sphereface2_balance)
            losses.append(torch.where(mine, right, wrong).sum(1).mean())
    loss = sum(share * one for share, one in zip(shares, losses, strict=True)) / sum(shares)
    return loss, torch.stack(losses), logits, *torch.autograd.grad(loss, [embeddings, *inputs])


@given(
    seed=st.integers(0, 2**16),
    batch=st.integers(1, 7),
    speakers=st.integers(1, 40),
    dims=st.lists(st.integers(2, 24), min_size=1, max_size=4, unique=True).map(sorted),
    shares=st.lists(st.sampled_from([0.0, 1.0, 2.5]), min_size=4, max_size=4),
    kind=st.sampled_from(sorted(KINDS)),
    part=st.sampled_from([0.0, 0.3, 1.0]),
    cached=st.sampled_from([1, 50, 2**20]),
)
def test_values_and_gradients_at_any_shape_and_in_any_blocks(seed, batch, speakers, dims, shares, kind, part, cached):
    """However little a block holds, down to one row of the batch and one of the weight."""
    shares = shares[: len(dims)] if any(shares[: len(dims)]) else [1.0] * len(dims)
    classifier = margin_classifier(
        **KINDS[kind], embedding_size=dims[-1], matryoshka_dims=dims, num_speakers=speakers, margin=0.3
    )
    torch.manual_seed(seed)
    labels = torch.randint(speakers, (batch,))
    embeddings = torch.randn(batch, dims[-1])
    torch.nn.init.normal_(classifier.weight)
    if classifier.bias is not None:
        torch.nn.init.normal_(classifier.bias)
    embeddings.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mrl_redimnet.speed.loss.CACHED_NUMBERS", cached)
        loss, losses, logits = classifier(embeddings, labels, 0.3 * part, shares)
        gradients = torch.autograd.grad(3.0 * loss, [embeddings, *classifier.parameters()])
    expected = plainly(classifier, embeddings, labels, 0.3 * part, shares)
    torch.testing.assert_close(loss.double(), expected[0], rtol=1e-5, atol=1e-5)
    used = torch.tensor(shares) > 0
    torch.testing.assert_close(losses[used].double(), expected[1][used], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits.double(), expected[2], rtol=1e-5, atol=1e-4)
    for ours, theirs in zip(gradients, expected[3:], strict=True):
        torch.testing.assert_close(ours.double(), 3.0 * theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_between_the_passes_it_keeps_one_tensor_of_logits_per_prefix(kind):
    """What else is kept grows with the batch or with the rows, not with both."""
    classifier = speed_up(margin_classifier(**KINDS[kind], num_speakers=500))
    loss = classifier(torch.randn(40, 32, requires_grad=True), torch.arange(40))[0]
    kept = sum(tensor.numel() for tensor in loss.grad_fn.saved_tensors)
    rows, prefixes = len(classifier.weight), len(classifier.dims)
    assert kept <= prefixes * 40 * rows + (32 + 2 * prefixes) * (rows + 40)


@pytest.mark.parametrize("frozen", ["embeddings", "weight"])
def test_what_is_frozen_gets_no_gradient_and_changes_no_other(frozen, each_path):
    for loss in LOSSES:
        classifier, embeddings = margin_classifier(loss=loss), torch.randn(6, 32, requires_grad=True)
        tensors = {"embeddings": embeddings, **dict(classifier.named_parameters())}
        whole = dict(
            zip(tensors, torch.autograd.grad(classifier(embeddings, LABELS)[0], tensors.values()), strict=True)
        )
        tensors[frozen].requires_grad_(False)
        classifier(embeddings, LABELS)[0].backward()
        assert tensors[frozen].grad is None
        assert all(torch.equal(tensors[name].grad, whole[name]) for name in tensors if name != frozen)


@pytest.mark.parametrize("kind", ["aam", "aam_all"])
def test_a_loss_needs_no_slopes_of_its_own(kind, monkeypatch):
    classifier, embeddings = margin_classifier(**KINDS[kind]), torch.randn(6, 32, requires_grad=True)
    found = []
    for slopes in (dict(SLOPES), {}):
        monkeypatch.setattr("mrl_redimnet.speed.loss.SLOPES", slopes)
        loss = speed_up(classifier)(embeddings, LABELS)[0]
        found.append([loss, *torch.autograd.grad(loss, [embeddings, classifier.weight])])
    torch.testing.assert_close(*found)


def test_every_loss_that_a_configuration_may_name_is_compared():
    assert {changes.get("loss", "aam") for changes in KINDS.values()} == set(LOSSES)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scope", [torch.no_grad, torch.inference_mode])
def test_without_gradients_the_loss_is_the_same_and_no_slope_is_computed(kind, scope, monkeypatch):
    """Of a held-out batch, as transformers' Trainer and others ask for."""
    model = tiny_model(tiny_config(**KINDS[kind]), kind=MRLReDimNetForXVector)
    batch, labels = torch.stack(waves(6_000, 6_000)), torch.tensor([4, 0])
    expected = model(batch, labels=labels)
    speed_up(model)
    monkeypatch.setattr(PrefixLosses, "apply", None)
    with scope():
        answer = model(batch, labels=labels)
    assert not answer.loss.requires_grad
    for name in ("loss", "logits", "prefix_losses"):
        torch.testing.assert_close(answer[name], expected[name])


def test_without_margin_it_is_a_softmax_of_scaled_cosines():
    classifier, embeddings, labels = margin_classifier(margin=0.0), torch.randn(4, 32), torch.tensor([0, 1, 2, 3])
    _, prefix_losses, logits = classifier(embeddings, labels)
    cosines = F.cosine_similarity(embeddings[:, None], classifier.weight[None], dim=-1)
    torch.testing.assert_close(logits, 32.0 * cosines)
    torch.testing.assert_close(prefix_losses[-1], F.cross_entropy(32.0 * cosines, labels))


@pytest.mark.parametrize("kind", ["aam", "aam_hard_negatives", "sphereface2"])
def test_a_margin_passed_in_replaces_the_configured_one(kind):
    """The margin of hard negatives goes along in proportion: half of it at half the margin."""
    embeddings = torch.randn(6, 32)
    passed_in = margin_classifier(margin=0.4, **KINDS[kind])(embeddings, LABELS, margin=0.2)[0]
    configured = margin_classifier(**{"margin": 0.2, **KINDS[kind]} | half_gain(kind))
    configured.load_state_dict(margin_classifier(margin=0.4, **KINDS[kind]).state_dict())  # the same start of a bias
    torch.testing.assert_close(passed_in, configured(embeddings, LABELS)[0])


def half_gain(kind: str) -> dict:
    return {k: v / 2 for k, v in KINDS[kind].items() if k == "hard_negative_margin"}


# ----------------------------------------------------------------------------------------------------------------------
# Sub-centers and hard negatives


@pytest.mark.parametrize("changes", [{}, SPHEREFACE2])
def test_sub_centers_that_are_all_alike_change_nothing(changes):
    one, three = margin_classifier(**changes), margin_classifier(**changes, sub_centers=3)
    assert three.weight.shape == (15, 32) and three.num_speakers == 5
    three.weight.data = one.weight.data.repeat_interleave(3, dim=0)
    embeddings = torch.randn(6, 32)
    for ours, theirs in zip(three(embeddings, LABELS), one(embeddings, LABELS), strict=True):
        torch.testing.assert_close(ours, theirs)


def test_an_utterance_trains_only_the_nearest_sub_center_of_its_speaker():
    classifier = margin_classifier(sub_centers=2, scale=4.0)
    classifier(classifier.weight[3:4].detach() + 0.05, torch.tensor([1]))[0].backward()
    moved = classifier.weight.grad.abs().sum(1) > 0
    assert moved[2:4].tolist() == [False, True]


def test_logits_are_those_of_the_nearest_sub_center():
    classifier, embeddings = margin_classifier(sub_centers=2), torch.randn(4, 32)
    cosines = F.cosine_similarity(embeddings[:, None], classifier.weight[None], dim=-1)
    expected = 32.0 * torch.maximum(cosines[:, 0::2], cosines[:, 1::2])
    torch.testing.assert_close(classifier.logits(embeddings), expected)
    torch.testing.assert_close(classifier(embeddings, LABELS[:4])[2], expected)


@pytest.mark.parametrize("changes", [{}, SPHEREFACE2])
def test_hard_negatives_make_the_loss_higher_and_beyond_all_speakers_no_higher(changes):
    embeddings = torch.randn(6, 32)
    counts = (0, 1, 2, 4, 9)
    losses = [margin_classifier(hard_negatives=k, **changes)(embeddings, LABELS)[0].item() for k in counts]
    assert losses == sorted(losses)
    assert losses[0] < losses[1] < losses[3] == losses[4]


def test_of_one_speaker_nothing_is_a_hard_negative():
    loss = margin_classifier(hard_negatives=3, num_speakers=1)(torch.randn(2, 32), torch.tensor([0, 0]))[0]
    assert loss.isfinite()


@pytest.mark.parametrize("margin", [0.06, 0.5, 1.4])
def test_a_reduced_angle_is_nearer_at_every_angle_and_keeps_the_order(margin):
    cosine = torch.linspace(-1, 1, 2_001, dtype=torch.float64)
    moved = angular_gain(cosine, margin)
    assert (moved[1:] > cosine[1:]).all()
    assert (moved.diff() > 0).all()
    far = cosine < math.cos(margin)
    torch.testing.assert_close(moved[far], torch.cos(torch.acos(cosine[far]) - margin), rtol=0, atol=5e-4)


@pytest.mark.parametrize("margin", [0.1, 0.5, 1.4])
def test_margin_makes_every_angle_harder(margin):
    """The target's logit falls with the angle all the way to pi, and is below the plain cosine."""
    cosine = torch.linspace(-1, 1, 2_001)
    moved = angular_margin(cosine, margin)
    assert (moved < cosine).all()
    assert (moved.diff() > 0).all()


@pytest.mark.parametrize("margin", [0.1, 0.2, 0.5, 1.4])
def test_margin_past_the_largest_angle_is_a_line_one_step_lower(margin):
    end = -math.cos(margin)
    before, after = angular_margin(torch.tensor([end + 1e-9, end - 1e-9], dtype=torch.float64), margin)
    assert before.item() == pytest.approx(-1.0, abs=1e-6)
    step = math.cos(margin) + margin * math.sin(margin) - 1.0
    assert before.item() - after.item() == pytest.approx(step, abs=1e-6) and step > 0


# ----------------------------------------------------------------------------------------------------------------------
# Weights of prefixes


@pytest.fixture
def empty_memory_is_nan():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", ["aam", "sphereface2_all"])
@pytest.mark.parametrize("weights", [[1, 0, 0], [0, 3, 1], [0, 1, 0]])
@pytest.mark.parametrize("given_late", [False, True])
def test_a_prefix_of_weight_zero_is_left_out(kind, weights, given_late, empty_memory_is_nan, each_path):
    """The others' losses and the logits stay as they are; the loss is the mean of the others by their ratios."""
    whole = margin_classifier(**KINDS[kind])
    some = margin_classifier(**KINDS[kind], prefix_weights=None if given_late else weights)
    embeddings = torch.randn(6, 32, requires_grad=True)
    _, all_losses, all_logits = whole(embeddings, LABELS)
    loss, losses, logits = some(embeddings, LABELS, prefix_weights=weights if given_late else None)
    used = torch.tensor(weights) > 0
    assert losses.isnan().tolist() == (~used).tolist()
    torch.testing.assert_close(losses[used], all_losses[used])
    torch.testing.assert_close(logits, all_logits)
    torch.testing.assert_close(loss.detach(), (all_losses * torch.tensor(weights) / sum(weights)).sum())
    loss.backward()
    assert embeddings.grad.isfinite().all() and some.weight.grad.isfinite().all()
    if weights == [1, 0, 0]:
        assert (embeddings.grad[:, :8] != 0).all() and not embeddings.grad[:, 8:].any()
        assert some.weight.grad[:, :8].any() and not some.weight.grad[:, 8:].any()


@pytest.mark.parametrize("weights", [[1, 1], [0, 0, 0], [1, -1, 1], [float("nan"), 1, 1]])
def test_weights_that_do_not_fit_are_refused(weights):
    with pytest.raises(ValueError, match="prefix_weights: got .* expected 3 numbers >= 0, not all 0"):
        margin_classifier()(torch.randn(1, 32), torch.tensor([0]), prefix_weights=weights)


@given(
    weights=st.lists(st.sampled_from([0.0, 0.5, 1.0, 3.0]), min_size=3, max_size=3).filter(any),
    factor=st.sampled_from([0.1, 1.0, 7.0]),
    kind=st.sampled_from(sorted(KINDS)),
)
def test_only_ratios_of_weights_matter(weights, factor, kind):
    classifier, embeddings = margin_classifier(**KINDS[kind]), torch.randn(6, 32, generator=torch.manual_seed(1))
    one = classifier(embeddings, LABELS, prefix_weights=weights)[0]
    other = classifier(embeddings, LABELS, prefix_weights=[factor * w for w in weights])[0]
    torch.testing.assert_close(one, other)


def test_the_model_passes_margin_and_weights_on():
    model = tiny_model(kind=MRLReDimNetForXVector)
    batch, labels = padded(waves(8_000, 6_000)), torch.tensor([4, 0])
    answer = model(**batch, labels=labels, margin=0.1, prefix_weights=[0, 1, 2])
    expected = model.classifier(answer.embeddings, labels, 0.1, [0, 1, 2])
    for ours, theirs in zip((answer.loss, answer.prefix_losses, answer.logits), expected, strict=True):
        torch.testing.assert_close(ours, theirs, equal_nan=True)


# ----------------------------------------------------------------------------------------------------------------------
# Numbers at the ends, precision


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, -1.0, 0.0, 1e-6, 1e4])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_is_finite_at_the_ends(kind, dtype, factor, each_path):
    """Embeddings that are a speaker's row, or its opposite, or nothing: where an arccos or a norm has no slope."""
    classifier = margin_classifier(**KINDS[kind]).to(dtype)
    embeddings = (factor * classifier.weight[:3].detach()).requires_grad_()
    loss = classifier(embeddings, torch.tensor([0, 1, 2]))[0]
    loss.backward()
    assert loss.isfinite()
    assert embeddings.grad.isfinite().all()
    assert all(parameter.grad.isfinite().all() for parameter in classifier.parameters())


@pytest.mark.parametrize("cosine", [-1.0 - 3e-7, -1.0, 1.0, 1.0 + 3e-7])
@pytest.mark.parametrize(
    "curve",
    [
        lambda z: angular_margin(z, 0.2),
        lambda z: angular_gain(z, 0.06),
        lambda z: sphereface2_similarity(z, 1.0),
        lambda z: sphereface2_similarity(z, 1.7),
    ],
)
def test_curves_are_finite_where_a_cosine_exceeds_one_by_rounding(curve, cosine):
    cosine = torch.tensor(cosine, requires_grad=True)
    value = curve(cosine)
    value.backward()
    assert value.isfinite() and cosine.grad.isfinite()


@pytest.mark.parametrize("kind", KINDS)
def test_under_autocast_it_is_computed_in_float32(kind, each_path):
    classifier, embeddings = margin_classifier(**KINDS[kind]), torch.randn(6, 32)
    exact = (*classifier(embeddings, LABELS), classifier.logits(embeddings))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answers = (*classifier(embeddings, LABELS), classifier.logits(embeddings))
    for ours, theirs in zip(answers, exact, strict=True):
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_float32_under_autocast_and_rounded_once_for_half_precision(kind, each_path):
    classifier, embeddings = margin_classifier(**KINDS[kind]).bfloat16(), torch.randn(6, 32).bfloat16()
    exact = margin_classifier(**KINDS[kind])
    exact.load_state_dict(classifier.state_dict())
    found = []
    for one, e in ((exact, embeddings.float()), (classifier, embeddings)):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = one(e.requires_grad_(), LABELS)[0]
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=each_path):  # autograd's own products would be half
            found.append(torch.autograd.grad(loss, [e, *one.parameters()]))
    loss = exact(e32 := embeddings.detach().float().requires_grad_(), LABELS)[0]
    for without, within, half in zip(torch.autograd.grad(loss, [e32, *exact.parameters()]), *found, strict=True):
        assert torch.equal(within, without)
        assert torch.equal(half, without.bfloat16())


# ----------------------------------------------------------------------------------------------------------------------
# Learning, starting, saving


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_falls_when_two_speakers_are_learnt(kind):
    torch.manual_seed(0)
    model = MRLReDimNetForXVector(tiny_config(num_speakers=2, **KINDS[kind])).train()
    quiet, loud = waves(6_000, 6_000)
    batch, labels = torch.stack([quiet, loud, quiet.flip(0), loud.flip(0)]), torch.tensor([0, 1, 0, 1])
    batch[1::2, 1:] += batch[1::2, :-1].clone()  # the second speaker's voice is darker
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    losses = []
    for _ in range(15):
        loss = model(batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize(
    ("speakers", "margin", "balance"),
    [
        (2, 0.0, 0.4),
        (2, 0.2, 0.7),
        (3, 0.2, 0.4),
        (5, 0.0, 0.7),
        (6_000, 0.2, 0.5),
        (6_000, 0.0, 0.4),
        (6_000, 0.2, 0.7),
    ],
)
def test_a_fresh_bias_has_no_slope_where_all_cosines_are_zero(speakers, margin, balance):
    """As random embeddings of many dimensions have them; otherwise the first steps would only move it."""
    classifier = margin_classifier(
        **SPHEREFACE2, num_speakers=speakers, margin=margin, sphereface2_balance=balance, scale=16.0
    )
    classifier.weight.data.zero_()
    classifier(torch.randn(6, 32), torch.zeros(6, dtype=torch.long))[0].backward()
    assert classifier.bias.grad.abs().max() < 1e-3 * balance  # the share: the slope if all positives were wrong
    assert classifier.bias.isfinite().all()


@pytest.mark.parametrize("kind", ["aam", "aam_hard_negatives", "sphereface2"])
@pytest.mark.parametrize("margin", [0.0, 0.2])
def test_chance_level_is_known_for_every_loss(kind, margin):
    """Other embeddings that know nothing have a loss that the guard against broken training accepts."""
    classifier = margin_classifier(num_speakers=200, **KINDS[kind])
    mean, deviation = chance_loss(classifier, margin)
    embeddings, labels = torch.randn(500, 32), torch.arange(500) % 200
    loss = classifier(embeddings, labels, margin)[0].item()
    assert abs(loss - mean) < max(0.05 * mean, 4 * deviation)


@pytest.mark.parametrize("kind", KINDS)
def test_save_and_load(kind, tmp_path):
    model = tiny_model(tiny_config(**KINDS[kind]), kind=MRLReDimNetForXVector)
    if model.classifier.bias is not None:
        model.classifier.bias.data += torch.tensor([0.5, -1.0, 2.0])
    model.save_pretrained(tmp_path)
    loaded, info = MRLReDimNetForXVector.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    assert loaded.config.to_diff_dict().items() >= KINDS[kind].items()


def test_another_loss_on_a_saved_model_starts_with_its_own_bias(tmp_path):
    """What the file lacks is initialised, not left as the memory was; the rows stay."""
    model = tiny_model(kind=MRLReDimNetForXVector)
    model.save_pretrained(tmp_path)
    loaded = MRLReDimNetForXVector.from_pretrained(tmp_path, **SPHEREFACE2)
    assert torch.equal(loaded.classifier.weight, model.classifier.weight)
    expected = margin_classifier(**SPHEREFACE2).bias
    torch.testing.assert_close(loaded.classifier.bias, expected)


def test_a_head_of_sphereface2_on_a_saved_encoder_starts_fresh(model, tmp_path):
    model.save_pretrained(tmp_path)
    loaded = MRLReDimNetForXVector.from_pretrained(tmp_path, num_speakers=500, **SPHEREFACE2)
    assert loaded.classifier.weight.std().item() == pytest.approx(32**-0.5, rel=0.05)
    torch.testing.assert_close(loaded.classifier.bias, margin_classifier(num_speakers=500, **SPHEREFACE2).bias)
