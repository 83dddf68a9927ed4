"""The faster forms of the network's modules against the definition: answers, gradients, statistics, names."""

import copy
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import VARIANTS, enable_checkpointing, padded, relative_error, tiny_config, tiny_model, waves
from peft import LoHaConfig, get_peft_model
from torch import nn

from masking_mrl_redimnet import BatchNorm
from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.speed import FAST, as_defined, blocks, linear, loss, norms, speed_up
from mrl_redimnet.speed.blocks import attention, residual
from mrl_redimnet.speed.linear import ONEDNN_FLOOR, FastLinear
from mrl_redimnet.speed.recompute import recomputed, recomputing


def embed(model, *args, **kwargs) -> torch.Tensor:
    with torch.inference_mode():
        return model(*args, **kwargs).embeddings


def assert_close_steps(ours: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]):
    """Gradients of 40 and more through a loss in float32, of which some cancel."""
    assert ours.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            ours[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda why, name=name: f"{name}: {why}"
        )


def as_on_a_gpu(monkeypatch):
    """The paths of accelerators, on a CPU."""
    for module in (linear, loss, norms):
        monkeypatch.setattr(module, "runs_on_cpu", lambda x: False)
    monkeypatch.setattr(blocks.attention, "__defaults__", (blocks.HEAD_SIZES,))


def drawn(norm: nn.BatchNorm1d) -> nn.BatchNorm1d:
    """With weights and statistics as after a training."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (norm.weight.data, norm.bias.data, norm.running_mean, norm.running_var):
        tensor.uniform_(0.5, 1.5, generator=generator)
    return norm


WIDTHS = {  # types of inputs and of weights, and how exact the answer can be
    "float64": (torch.float64, torch.float64, 1e-12),
    "float32": (torch.float32, torch.float32, 1e-6),
    "autocast to bfloat16": (torch.bfloat16, torch.float32, 4e-3),
    "autocast to float16": (torch.float16, torch.float32, 5e-4),
    "bfloat16": (torch.bfloat16, torch.bfloat16, 8e-3),
    "float16": (torch.float16, torch.float16, 1e-3),
}


@pytest.mark.parametrize("kind", ["defined", "fast", "as on a GPU"])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("types", WIDTHS)
def test_a_norm_that_trains_has_autograds_gradients(types, masked, kind, monkeypatch):
    """Answer, gradients and statistics of each path against the plain formula in float64."""
    of_inputs, of_weights, limit = WIDTHS[types]
    generator = torch.Generator().manual_seed(0)
    norm = drawn(BatchNorm(6)).to(of_weights).train()
    if kind != "defined":
        speed_up(norm)
    if kind == "as on a GPU":
        as_on_a_gpu(monkeypatch)
    x = (2.0 + 3.0 * torch.randn(3, 40, 5, 6, generator=generator)).to(of_inputs).requires_grad_()
    direction = torch.randn(3, 40, 5, 6, generator=generator).to(of_inputs)
    mask = (torch.arange(40) < torch.tensor([[40], [17], [1]]))[..., None] if masked else None
    valid = mask[..., 0] if masked else ...

    exact, weight, bias = (t.detach().double().requires_grad_() for t in (x, norm.weight, norm.bias))
    rows = exact[valid].flatten(0, -2)
    variance, mean = torch.var_mean(rows, 0, correction=0)
    expected = (exact - mean) / (variance + norm.eps).sqrt() * weight + bias
    (expected[valid] * direction.double()[valid]).sum().backward()
    moved = [0.9 * norm.running_mean.double() + 0.1 * mean.detach()]
    moved.append(0.9 * norm.running_var.double() + 0.1 * rows.detach().var(0))

    answer = norm(x, mask)
    assert answer.dtype == of_inputs
    assert not masked or not answer[~valid].any()
    (answer * direction).sum().backward()
    pairs = [(answer[valid], expected[valid]), (x.grad, exact.grad), (norm.weight.grad, weight.grad)]
    pairs += [(norm.bias.grad, bias.grad), (norm.running_mean, moved[0]), (norm.running_var, moved[1])]
    for ours, theirs in pairs:
        assert relative_error(ours.detach(), theirs.detach()) < limit


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("kind", ["fast", "as on a GPU"])
def test_a_training_step_is_the_definitions(variant, masked, kind, monkeypatch):
    """Loss, gradients and statistics, in float64 but for pooling and loss; sums of squares would lose digits."""
    config = tiny_config(variant, scale=8.0)
    batch = padded(waves(6_000, 8_000, 5_000)) if masked else {"input_values": torch.stack(waves(6_000, 6_000, 6_000))}
    steps = []
    for fast in (False, True):
        model = tiny_model(config, kind=MRLReDimNetForXVector).double().train()
        if fast:
            speed_up(model)
        if fast and kind == "as on a GPU":
            as_on_a_gpu(monkeypatch)
        loss = model(**batch, labels=torch.tensor([0, 3, 1])).loss
        loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters()}
        steps.append({"loss": loss.detach(), **gradients, **dict(model.named_buffers())})
    assert_close_steps(*steps)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("masked", [False, True])
def test_embeddings_are_the_definitions(variant, masked):
    """With norms folded into the layers before them, and sums in place."""
    model = tiny_model(tiny_config(variant))
    batch = padded(waves(6_000, 8_000, 5_000)) if masked else {"input_values": torch.stack(waves(6_000, 6_000, 6_000))}
    expected = embed(model, **batch)
    assert relative_error(embed(speed_up(model), **batch), expected) < 1e-5
    torch.testing.assert_close(embed(as_defined(model), **batch), expected, rtol=0, atol=0)


def test_names_and_weights_stay():
    model = tiny_model(kind=MRLReDimNetForXVector)
    before = dict(model.state_dict(keep_vars=True))
    kinds = [type(module) for module in model.modules()]
    speed_up(model)
    after = model.state_dict(keep_vars=True)
    assert list(before) == list(after) and all(after[name] is tensor for name, tensor in before.items())
    assert [type(module) for module in model.modules()] != kinds
    assert speed_up(model) is model
    assert [type(module) for module in as_defined(model).modules()] == kinds


def test_every_faster_form_is_one_of_the_class_that_it_stands_for():
    for defined, fast in FAST.items():
        replaced = [name for name, value in vars(fast).items() if callable(value) and hasattr(defined, name)]
        assert issubclass(fast, defined) and replaced, fast
    assert len(set(FAST.values())) == len(FAST)


@pytest.mark.parametrize("frozen", [True, False])
def test_gradient_checkpointing(frozen):
    """The same gradients and statistics as of the definition without it."""
    steps = []
    for saving in (False, True):
        model = tiny_model(kind=MRLReDimNetForXVector).double().train()
        model.redimnet.trunk.requires_grad_(not frozen)
        if saving:
            enable_checkpointing(speed_up(model))
        model(**padded(waves(6_000, 8_000, 8_000)), labels=torch.tensor([0, 3, 1])).loss.backward()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        steps.append({**gradients, **dict(model.named_buffers())})
    assert_close_steps(*steps)


@pytest.mark.parametrize("fast", [False, True])
def test_padding_may_be_nan_for_a_norm_that_trains(fast):
    norm, x = (speed_up(BatchNorm(3)) if fast else BatchNorm(3)).train(), torch.randn(2, 5, 3)
    mask = (torch.arange(5) < torch.tensor([[5], [3]]))[..., None]
    x[1, 3:] = torch.nan
    x.requires_grad_()
    norm(x, mask).square().sum().backward()
    assert x.grad.isfinite().all() and norm.weight.grad.isfinite().all() and norm.running_var.isfinite().all()


@pytest.mark.parametrize("size", [5, 8, 27])
@pytest.mark.parametrize("masked", [False, True])
def test_heads_widened_by_zeros_attend_alike(size, masked):
    q, k, v = torch.randn(3, 2, 4, 30, size, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    keys = (torch.arange(30) < torch.tensor([[30], [12]]))[:, None, None] if masked else None
    answers = []
    for multiple in (1, 8):
        inputs = [part.clone().requires_grad_() for part in (q, k, v)]
        answer = attention(*inputs, keys, multiple)
        answers.append([answer, *torch.autograd.grad(answer.square().sum(), inputs)])
    torch.testing.assert_close(*answers)


def test_a_norms_statistics_keep_their_digits_over_many_rows():
    """torch's own batch norm adds up hundreds of thousands of rows one by one: about 1e-4 of the variance is lost."""
    norm = speed_up(BatchNorm(10, momentum=1.0)).train()
    x = torch.randn(4, 1500, 40, 10, generator=torch.Generator().manual_seed(0)).relu_() + 0.5
    norm(x)
    variance, mean = torch.var_mean(x.double(), (0, 1, 2))
    torch.testing.assert_close(norm.running_mean.double(), mean, rtol=2e-6, atol=0)
    torch.testing.assert_close(norm.running_var.double(), variance, rtol=1e-5, atol=0)


def test_a_sum_has_the_wider_type_with_and_without_gradients():
    """On CUDA autocast makes norms float32 and layers bfloat16."""
    wide, narrow = torch.randn(3), torch.randn(3).bfloat16()
    for x, y in ((wide, narrow), (narrow, wide)):
        training = residual(x, y.clone().requires_grad_())
        torch.testing.assert_close(residual(x, y.clone()), training.detach(), rtol=0, atol=0)


@pytest.mark.parametrize("shape", [(3, 50, 40, 12), (2, 300, 60)])
def test_a_fast_linear_layer_is_a_linear_layer(shape):
    """Answer and gradients of inputs that go through oneDNN; its answer may be written into, as nn.Linear's may."""
    torch.manual_seed(0)
    ours = FastLinear(shape[-1], 24)
    theirs = nn.Linear(shape[-1], 24)
    theirs.load_state_dict(ours.state_dict())
    inputs = [torch.randn(shape).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    assert inputs[0].numel() > ONEDNN_FLOOR
    for layer, x in zip((ours, theirs), inputs, strict=True):
        y = layer(x)
        y += 1.0
        y.square().sum().backward()
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=1e-4, atol=1e-2)
    torch.testing.assert_close(ours.bias.grad, theirs.bias.grad, rtol=1e-4, atol=1e-2)


@pytest.mark.parametrize("frozen", [None, "x", "weight", "bias"])
@pytest.mark.parametrize("bias", [True, False])
def test_a_fast_linear_layers_gradients_are_autograds(bias, frozen):
    """Of the convolutions that it is computed by, against a linear layer in float64."""
    torch.manual_seed(0)
    layer, x = FastLinear(40, 24, bias=bias), torch.randn(3, 50, 4, 40)
    assert x.numel() > ONEDNN_FLOOR
    inputs = {"x": x, **dict(layer.named_parameters())}
    for name, tensor in inputs.items():
        tensor.requires_grad_(name != frozen)
    exact = {name: t.detach().double().requires_grad_(t.requires_grad) for name, t in inputs.items()}
    answer, expected = layer(x), F.linear(exact["x"], exact["weight"], exact.get("bias"))
    assert relative_error(answer, expected) < 1e-6
    (answer.square().sum()).backward()
    (expected.square().sum()).backward()
    for name, tensor in inputs.items():
        assert (tensor.grad is None) is (name == frozen)
        assert name == frozen or relative_error(tensor.grad, exact[name].grad) < 1e-5


# Variant, with padding, in bfloat16.
LEAN = [
    ("convnext_convatt", False, False),
    ("convnext_convatt", True, True),
    ("convnext_conv", False, True),
    ("convnext_relu_att", True, True),
    ("resnet_fc", True, False),
    ("fwse_att", True, True),
    ("redimnet2_dual", False, True),
    ("redimnet2_dual", True, False),
]


@pytest.mark.parametrize(("variant", "masked", "autocast"), LEAN)
def test_what_the_backward_pass_computes_anew_is_what_it_would_have_kept(variant, masked, autocast):
    model = speed_up(tiny_model(tiny_config(variant))).train()
    batch = padded(waves(6_000, 8_000, 5_000)) if masked else {"input_values": torch.stack(waves(8_000, 8_000))}
    gradients = []
    for again in (True, False):
        twin = copy.deepcopy(model)
        with recomputing(again), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            answer = twin(**batch).embeddings
        answer.square().sum().backward()
        gradients.append({name: p.grad for name, p in twin.named_parameters()})
    torch.testing.assert_close(*gradients)


def test_a_backward_pass_asks_for_what_was_not_kept():
    calls = []

    def again():
        calls.append(1)
        return source.sin()

    source = torch.randn(5, 7).requires_grad_()
    recomputed(F.gelu, source.sin(), again).sum().backward()
    gradient, source.grad = source.grad, None
    F.gelu(source.sin()).sum().backward()
    torch.testing.assert_close(gradient, source.grad, rtol=0, atol=0)
    assert calls == [1]
    with recomputing(False):
        recomputed(F.gelu, source.sin(), again).sum().backward()
    assert calls == [1]


def test_an_adapter_on_a_convolution_is_not_lost_where_norms_are_folded_in():
    model, x = speed_up(tiny_model()), torch.stack(waves(6_000, 6_000))
    names = [name for name, part in model.named_modules() if name.endswith("blocks.0.conv")]
    plain = embed(model, x)
    adapted = get_peft_model(model, LoHaConfig(target_modules=names, r=2, init_weights=False))
    changed = embed(adapted, input_values=x)
    merged = embed(adapted.merge_and_unload(), x)
    assert not torch.allclose(plain, changed, rtol=1e-2)
    torch.testing.assert_close(changed, merged, rtol=1e-4, atol=1e-5)


def test_onednn_keeps_few_shapes_so_that_recordings_of_all_lengths_do_not_fill_the_memory():
    script = """if True:
        import torch
        import mrl_redimnet.speed
        conv = torch.nn.Conv2d(8, 8, 3).eval()
        with torch.no_grad(), torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON_CREATION):
            for height in [*range(10, 200), 10]:
                conv(torch.randn(2, 8, height, 50))
        """
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    made = [line for line in done.stdout.splitlines() if "create:cache_miss" in line and "_ih10oh8" in line]
    assert len(made) == 2 or "onednn_verbose" not in done.stdout, made  # other CPUs may not use oneDNN
