"""What a student learns from a teacher: the losses against brute force, their invariances, and the axes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet.training.distillation import AXES_FILE, PrincipalAxes, direction_loss, similarity_loss

DIMS = [4, 8, 16]


def normal(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def rotation(size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(normal(size, size, seed=seed, dtype=torch.float64))[0]


def brute_force(embeddings, teacher, dims, weights) -> float:
    """Pair by pair, prefix by prefix, in Python's numbers."""

    def cosine(a: list[float], b: list[float]) -> float:
        return sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)

    rows, wanted, total = embeddings.double().tolist(), teacher.double().tolist(), 0.0
    pairs = [(i, j) for i in range(len(rows)) for j in range(len(rows)) if i != j]
    for dim, weight in zip(dims, weights, strict=True):
        errors = [(cosine(rows[i][:dim], rows[j][:dim]) - cosine(wanted[i], wanted[j])) ** 2 for i, j in pairs]
        total += weight / sum(weights) * sum(errors) / len(errors)
    return total


@pytest.mark.parametrize("crops", [2, 3, 7])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0], [0.1, 0.1, 0.1]])
def test_the_loss_is_that_of_the_definition(crops, weights):
    embeddings, teacher = normal(crops, 16), normal(crops, 5, seed=1)
    expected = brute_force(embeddings, teacher, DIMS, weights or [1.0] * 3)
    loss = similarity_loss(embeddings, teacher, DIMS, weights)
    assert loss.shape == () and loss.item() == pytest.approx(expected, rel=1e-5)


def test_a_crop_is_not_compared_with_itself():
    """Not even one without a direction, whose cosines are all 0."""
    embeddings, teacher = torch.tensor([[0.0, 0.0], [3.0, 4.0]]), torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    assert similarity_loss(embeddings, teacher, [2]).item() == pytest.approx(0.5)  # cos(45 degrees) squared


def test_dimensions_behind_the_last_prefix_do_not_count():
    embeddings, teacher = normal(4, 16), normal(4, 5, seed=1)
    assert torch.equal(
        similarity_loss(embeddings, teacher, [4, 8]), similarity_loss(embeddings[:, :8], teacher, [4, 8])
    )


@pytest.mark.parametrize("dim", DIMS)
def test_a_prefix_of_the_teachers_geometry_costs_nothing(dim):
    embeddings = normal(6, 16)
    teacher = 7.0 * embeddings[:, :dim] @ rotation(dim).float()
    assert similarity_loss(embeddings, teacher, [dim]).item() < 1e-11
    others = [d for d in DIMS if d != dim]
    assert similarity_loss(embeddings, teacher, others).item() > 1e-3


@given(
    seed=st.integers(0, 10**6),
    crops=st.integers(2, 9),
    width=st.integers(1, 24),
    scale=st.floats(1e-3, 1e3),
    mirrored=st.booleans(),
)
def test_an_orthogonal_map_and_a_scale_of_the_teacher_change_nothing(seed, crops, width, scale, mirrored):
    embeddings, teacher = normal(crops, 16, seed=seed), normal(crops, width, seed=seed + 1, dtype=torch.float64)
    turn = rotation(width, seed=seed + 2)
    if mirrored:
        turn[:, 0] *= -1
    loss = similarity_loss(embeddings, teacher, DIMS)
    torch.testing.assert_close(similarity_loss(embeddings, scale * teacher @ turn, DIMS), loss, rtol=1e-4, atol=1e-6)


@given(seed=st.integers(0, 10**6), scale=st.floats(1e-2, 1e2))
def test_the_order_of_the_crops_and_the_students_scale_change_nothing(seed, scale):
    embeddings, teacher = normal(6, 16, seed=seed), normal(6, 5, seed=seed + 1)
    order = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    torch.testing.assert_close(
        similarity_loss(scale * embeddings[order], teacher[order], DIMS), similarity_loss(embeddings, teacher, DIMS)
    )


def test_gradients_flow_to_the_student_only():
    embeddings, teacher = normal(5, 16).requires_grad_(), normal(5, 8, seed=1).requires_grad_()
    similarity_loss(embeddings, teacher, DIMS).backward()
    assert teacher.grad is None
    assert embeddings.grad.isfinite().all() and (embeddings.grad.abs().sum(0) > 0).all()


def test_gradients_are_those_of_the_loss():
    embeddings, teacher = normal(4, 16).requires_grad_(), normal(4, 8, seed=1)
    similarity_loss(embeddings, teacher, DIMS, [1.0, 2.0, 0.5]).backward()
    direction, step = normal(4, 16, seed=2), 1e-4
    rise = [
        brute_force(embeddings.detach().double() + s * direction, teacher, DIMS, [1, 2, 0.5]) for s in (step, -step)
    ]
    expected = (rise[0] - rise[1]) / (2 * step)
    assert (embeddings.grad * direction).sum().item() == pytest.approx(expected, rel=1e-3)


def test_crops_that_sound_the_same_have_finite_gradients():
    embeddings = normal(1, 16).expand(4, 16).clone().requires_grad_()
    similarity_loss(embeddings, normal(4, 8), DIMS).backward()
    assert embeddings.grad.isfinite().all()


def test_every_prefix_learns_the_teachers_geometry():
    teacher, embeddings = normal(6, 32, seed=1), normal(6, 16).requires_grad_()
    optimizer = torch.optim.Adam([embeddings], lr=0.05)
    first = [similarity_loss(embeddings.detach(), teacher, [dim]).item() for dim in (8, 16)]
    for _ in range(300):
        optimizer.zero_grad()
        similarity_loss(embeddings, teacher, [8, 16]).backward()
        optimizer.step()
    last = [similarity_loss(embeddings.detach(), teacher, [dim]).item() for dim in (8, 16)]
    assert all(after < 0.02 * before for before, after in zip(first, last, strict=True))


def test_the_loss_is_in_float32_within_autocast_too():
    embeddings, teacher = normal(5, 16), normal(5, 8, seed=1)
    expected = similarity_loss(embeddings, teacher, DIMS)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = similarity_loss(embeddings, teacher, DIMS)
    assert loss.dtype == torch.float32 and torch.equal(loss, expected)
    halved = similarity_loss(embeddings.bfloat16(), teacher.bfloat16(), DIMS)
    assert halved.dtype == torch.float32
    assert torch.equal(halved, similarity_loss(embeddings.bfloat16().float(), teacher.bfloat16().float(), DIMS))


@pytest.mark.parametrize(
    ("embeddings", "teacher", "options", "message"),
    [
        ((1, 16), (1, 8), {}, "batch_size: got 1 crop"),
        ((0, 16), (0, 8), {}, "batch_size: got 0 crop"),
        ((3, 16), (4, 8), {}, r"\(3, 16\) and \(4, 8\)"),
        ((3, 16), (3,), {}, r"\(3,\), expected \[B, D\]"),
        ((3, 16), (3, 8), dict(dims=[8, 8]), r"dims: got \[8, 8\]"),
        ((3, 16), (3, 8), dict(dims=[0, 8]), r"dims: got \[0, 8\]"),
        ((3, 16), (3, 8), dict(dims=[8, 17]), "prefixes of 16 dimensions"),
        ((3, 16), (3, 8), dict(dims=[]), r"dims: got \[\]"),
        ((3, 16), (3, 8), dict(prefix_weights=[1.0]), "expected 3 numbers"),
        ((3, 16), (3, 8), dict(prefix_weights=[0.0] * 3), "not all 0"),
        ((3, 16), (3, 8), dict(prefix_weights=[2.0, 0.0, -1.0]), ">= 0"),
    ],
)
def test_what_does_not_fit_is_refused(embeddings, teacher, options, message):
    with pytest.raises(ValueError, match=message):
        similarity_loss(torch.ones(embeddings), torch.ones(teacher), **{"dims": DIMS, **options})


# ---------------------------------------------------------------- direction


def direction_by_force(embeddings, targets, dims, weights) -> float:
    """Crop by crop, prefix by prefix, in Python's numbers; prefixes beyond the targets count once."""
    size, total, share = targets.shape[1], 0.0, {}
    for dim, weight in zip(dims, weights, strict=True):
        share[min(dim, size)] = max(weight, share.get(min(dim, size), 0.0))
    for dim, weight in share.items():
        for a, b in zip(embeddings[:, :dim].double().tolist(), targets[:, :dim].double().tolist(), strict=True):
            cosine = sum(x * y for x, y in zip(a, b, strict=True)) / math.hypot(*a) / math.hypot(*b)
            total += weight / sum(share.values()) * (1 - cosine) / len(embeddings)
    return total


@pytest.mark.parametrize("crops", [1, 5])
@pytest.mark.parametrize("size", [3, 8, 10, 16, 40])
@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 3.0]])
def test_the_direction_loss_is_that_of_the_definition(crops, size, weights):
    embeddings, targets = normal(crops, 16), normal(crops, size, seed=1)
    expected = direction_by_force(embeddings, targets, DIMS, weights or [1.0] * 3)
    assert direction_loss(embeddings, targets, DIMS, weights).item() == pytest.approx(expected, rel=1e-5)


@given(seed=st.integers(0, 10**6), mine=st.floats(1e-3, 1e3), other=st.floats(1e-3, 1e3), size=st.integers(1, 24))
def test_the_direction_loss_is_0_at_equality_and_no_scale_changes_it(seed, mine, other, size):
    embeddings, targets = normal(6, 16, seed=seed), normal(6, size, seed=seed + 1)
    loss = direction_loss(embeddings, targets, DIMS)
    torch.testing.assert_close(direction_loss(mine * embeddings, other * targets, DIMS), loss, rtol=1e-4, atol=1e-6)
    assert 0 <= loss.item() <= 2 and abs(direction_loss(embeddings, other * embeddings, DIMS).item()) < 1e-6
    assert direction_loss(embeddings, -embeddings, DIMS).item() == pytest.approx(2)


def test_numbers_behind_the_targets_get_no_gradient():
    embeddings = normal(5, 16).requires_grad_()
    direction_loss(embeddings, normal(5, 10, seed=1), DIMS).backward()
    assert (embeddings.grad[:, 10:] == 0).all() and (embeddings.grad[:, :10].abs().sum(0) > 0).all()


def test_a_prefix_of_weight_0_is_not_taught():
    embeddings = normal(5, 16).requires_grad_()
    direction_loss(embeddings, normal(5, 16, seed=1), DIMS, [1.0, 0.0, 0.0]).backward()
    assert (embeddings.grad[:, 4:] == 0).all()


def test_the_direction_loss_is_in_float32_and_finite_where_there_is_no_direction():
    embeddings, targets = normal(5, 16), normal(5, 8, seed=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = direction_loss(embeddings.bfloat16(), targets, DIMS)
    assert loss.dtype == torch.float32
    assert torch.equal(loss, direction_loss(embeddings.bfloat16().float(), targets, DIMS))
    zero = torch.zeros(3, 16, requires_grad=True)
    direction_loss(zero, normal(3, 8), DIMS).backward()
    assert zero.grad.isfinite().all()


def test_no_crop_has_no_direction():
    with pytest.raises(ValueError, match="got 0 crop, distillation needs at least 1"):
        direction_loss(torch.ones(0, 16), torch.ones(0, 8), DIMS)


def test_principal_axes_keep_cosines_and_put_most_energy_first():
    speech = (normal(200, 6) * torch.tensor([0.1, 3.0, 0.2, 1.0, 0.5, 0.05])) @ rotation(6).float()
    axes = PrincipalAxes()
    axes.fit(speech.numpy())
    turned = axes.rotated(5.0 * speech)
    unit = torch.nn.functional.normalize(speech, dim=1)
    torch.testing.assert_close(turned @ turned.T, unit @ unit.T, atol=1e-5, rtol=0)
    energies = turned.square().mean(0)
    assert (energies.diff() <= 0).all() and energies[0] > 0.5
    again = PrincipalAxes()
    again.load_state_dict(axes.state_dict())
    assert torch.equal(again.rotated(speech), axes.rotated(speech))


def test_saved_axes_are_read_again(tmp_path):
    axes, again = PrincipalAxes(), PrincipalAxes()
    axes.fit(torch.randn(50, 6).numpy())
    axes.save(tmp_path)
    again.read(tmp_path / AXES_FILE, 6)
    assert torch.equal(again.axes, axes.axes)
    with pytest.raises(ValueError, match=r"teacher_axes: .* has axes \(6, 6\), the teacher's embeddings have 7"):
        again.read(tmp_path / AXES_FILE, 7)
    (tmp_path / "no.safetensors").write_bytes(b"nothing")
    for name in ("no.safetensors", "none.safetensors"):
        with pytest.raises(ValueError, match=f"teacher_axes: .*{name} holds no axes of a teacher"):
            again.read(tmp_path / name, 6)
