"""Two processes (gloo, on CPUs), each with half of a batch, against this one with the whole of it."""

import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import enable_checkpointing, leave_together, padded, relative_error, tiny_config, tiny_model, waves
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode

from masking_mrl_redimnet import BatchNorm
from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.speed import speed_up
from mrl_redimnet.speed.norms import FastBatchNorm, synchronise_batch_norms

pytestmark = pytest.mark.slow  # the processes take ten seconds to start

# Variant and whether with gradient checkpointing.
MODELS = [
    ("convnext_convatt", False),
    ("convnext_convatt", True),
    ("fwse_att", True),
    ("norm_batch", False),
    ("aggregation", False),
    ("tstp_embedding_norm", False),
]
LABELS = torch.tensor([0, 3, 1, 3])
# Very different loudness: statistics of one half say little about the other.
UTTERANCES = [scale * wave for scale, wave in zip((1, 30, 0.1, 3), waves(4_800, 9_000, 6_000, 6_001), strict=True)]
NORM_INPUT = 5.0 + 3.0 * torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
NORM_INPUT[4:] += 100.0  # the processes' means are far apart
SHARES = {"even": [4, 4], "uneven": [7, 1]}  # rows of NORM_INPUT per process
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def learner(variant: str) -> MRLReDimNetForXVector:
    """In float64, so that rounding does not grow through many layers to what a mistake could be."""
    model = tiny_model(tiny_config(variant, num_speakers=4, scale=8.0), kind=MRLReDimNetForXVector)
    return speed_up(model).train().double()


def train_step(model: nn.Module, rows: slice = slice(None)) -> dict[str, torch.Tensor]:
    """Embeddings, gradients and statistics after learning from some rows of the batch."""
    batch = {name: tensor[rows] for name, tensor in padded(UTTERANCES).items()}
    answer = model(**batch, labels=LABELS[rows])
    answer.loss.backward()
    model = getattr(model, "module", model)
    gradients = {f"gradient of {name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"embeddings": answer.embeddings.detach(), **gradients, **dict(model.named_buffers())}


def norm_step(norm: nn.Module, x: torch.Tensor) -> dict[str, torch.Tensor]:
    """Answer, gradients and statistics; the loss is a sum over rows, so no averaging comes in."""
    x = x.clone().requires_grad_()
    out = norm(x)
    (out * torch.arange(1.0, 4.0) * x.detach().cos()).float().sum().backward()
    parts = {"out": out.detach(), "gradient of x": x.grad, "weight": norm.weight.grad, "bias": norm.bias.grad}
    return parts | dict(norm.named_buffers())


def a_norm(**options) -> FastBatchNorm:
    norm = speed_up(BatchNorm(3, **options))
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([0.5, 1.0, 2.0]))
        norm.bias.copy_(torch.tensor([0.0, -1.0, 1.0]))
    return norm.train()


# ----------------------------------------------------------------------------------------------------------------------
# What each of the two does; everything here, because starting processes takes seconds


def process(rank: int, port: int, folder: str):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"tcp://127.0.0.1:{port}", timeout=timedelta(seconds=60), rank=rank, world_size=2)
    leave_together(rank, folder, work(rank))


def work(rank: int) -> dict:
    results = {}
    half = slice(2 * rank, 2 * rank + 2)
    for variant, saving in MODELS:
        model = learner(variant)
        synchronise_batch_norms(model)
        if saving:
            enable_checkpointing(model)
        results[f"model {variant} {saving}"] = train_step(DistributedDataParallel(model), half)

    model = learner("convnext_convatt")
    synchronise_batch_norms(model)
    synchronise_batch_norms(model, False)
    results["off again"] = train_step(model, half)

    model = learner("convnext_convatt").requires_grad_(False)
    synchronise_batch_norms(model)
    results["frozen"] = {"embeddings": model(**padded(UTTERANCES[half])).embeddings}

    for name, shares in SHARES.items():
        for dtype_name, dtype in DTYPES.items():
            norm = a_norm()
            synchronise_batch_norms(norm)
            results[f"norm {name} {dtype_name}"] = norm_step(norm, NORM_INPUT.to(dtype).split(shares)[rank])

    norm = a_norm(momentum=None)
    synchronise_batch_norms(norm)
    for _ in range(3):
        norm(NORM_INPUT.chunk(2)[rank])
    results["cumulative"] = dict(norm.named_buffers())

    norm = a_norm()
    synchronise_batch_norms(norm)
    x = torch.randn(1, 6, 2, 3, generator=torch.Generator().manual_seed(rank))
    results["masked"] = {"out": norm(x, None if rank == 0 else torch.arange(6)[None, :, None] < 4).detach()}
    results["masked"] |= dict(norm.named_buffers())

    results["collectives"] = count_collectives(a_norm(), NORM_INPUT.chunk(2)[rank])
    return results


class Collectives(TorchDispatchMode):
    """Counts the collectives that are called within."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function.namespace == "c10d"
        return function(*args, **(kwargs or {}))


def count_collectives(norm: FastBatchNorm, x: torch.Tensor) -> tuple[int, int]:
    """Of the forward and of the backward pass."""
    synchronise_batch_norms(norm)
    with Collectives() as forward:
        out = norm(x.clone().requires_grad_())
    with Collectives() as backward:
        out.sum().backward()
    return forward.count, backward.count


@pytest.fixture(scope="module")
def both(tmp_path_factory) -> list[dict]:
    """The two processes' results."""
    folder = tmp_path_factory.mktemp("processes")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(process, (port, str(folder)), nprocs=2)
    return [torch.load(folder / f"{rank}.pt") for rank in range(2)]


# ----------------------------------------------------------------------------------------------------------------------
# What must come out


@pytest.mark.parametrize(("variant", "saving"), MODELS)
def test_two_processes_are_one_with_the_joined_batch(both, variant, saving):
    """Embeddings, statistics, and gradients averaged by DistributedDataParallel; saving: gradient checkpointing."""
    expected = train_step(learner(variant))
    ours = [results[f"model {variant} {saving}"] for results in both]
    embeddings = torch.cat([result["embeddings"] for result in ours])
    assert relative_error(embeddings, expected.pop("embeddings")) < 1e-5
    assert expected.keys() | {"embeddings"} == ours[0].keys()
    for name, tensor in expected.items():
        # Pooling and loss are float32 all the same; gradients are up to 40, and some cancel.
        torch.testing.assert_close(ours[0][name], tensor, rtol=1e-5, atol=3e-6, msg=name)
        assert torch.equal(ours[0][name], ours[1][name]), name


def test_without_synchronisation_each_has_its_own_statistics(both):
    for rank, results in enumerate(both):
        expected = train_step(learner("convnext_convatt"), slice(2 * rank, 2 * rank + 2))
        for name, tensor in expected.items():
            torch.testing.assert_close(results["off again"][name], tensor, rtol=1e-5, atol=3e-6, msg=name)


def test_frozen_norms_stay_frozen(both):
    in_use = learner("convnext_convatt").eval()
    for rank, results in enumerate(both):
        expected = in_use.redimnet(**padded(UTTERANCES[2 * rank : 2 * rank + 2])).embeddings
        torch.testing.assert_close(results["frozen"]["embeddings"], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shares", SHARES)
def test_a_norm_is_that_of_the_joined_batch_however_it_is_shared(both, shares, dtype):
    """One row alone in a process included, of which torch would say that it has no variance."""
    expected = norm_step(a_norm(), NORM_INPUT.to(DTYPES[dtype]))
    ours = [results[f"norm {shares} {dtype}"] for results in both]
    joined = {name: torch.cat([result[name] for result in ours]) for name in ("out", "gradient of x")}
    joined |= {name: ours[0][name] + ours[1][name] for name in ("weight", "bias")}
    tolerance = 1e-5 if dtype == "float32" else 1e-2
    for name, tensor in (ours[0] | joined).items():
        assert tensor.dtype == expected[name].dtype, name
        torch.testing.assert_close(tensor, expected[name], rtol=tolerance, atol=tolerance, msg=name)


def test_without_momentum_statistics_are_the_mean_over_batches(both):
    norm = a_norm(momentum=None)
    for _ in range(3):
        norm(NORM_INPUT)
    for name, tensor in norm.named_buffers():
        torch.testing.assert_close(both[0]["cumulative"][name], tensor, msg=name)


def test_padded_frames_count_for_nothing(both):
    """Six frames in one process, four of six in the other."""
    x = [torch.randn(1, 6, 2, 3, generator=torch.Generator().manual_seed(rank)) for rank in range(2)]
    norm = a_norm()
    expected = norm(torch.cat([x[0].flatten(0, 2), x[1][:, :4].flatten(0, 2)]))
    ours = [results["masked"] for results in both]
    valid = torch.cat([ours[0]["out"].flatten(0, 2), ours[1]["out"][:, :4].flatten(0, 2)])
    torch.testing.assert_close(valid, expected, rtol=1e-5, atol=1e-5)
    assert not ours[1]["out"][:, 4:].any()
    for name, tensor in norm.named_buffers():
        torch.testing.assert_close(ours[0][name], tensor, msg=name)


def test_each_pass_takes_one_collective(both):
    assert [results["collectives"] for results in both] == [(1, 1), (1, 1)]


def test_in_one_process_nothing_changes():
    plain, told = (speed_up(tiny_model(kind=MRLReDimNetForXVector)).train() for _ in range(2))
    synchronise_batch_norms(told)
    norms = [module for module in told.modules() if isinstance(module, nn.BatchNorm1d)]
    assert norms and all(norm.synchronised for norm in norms)
    assert not any(module.synchronised for module in plain.modules() if isinstance(module, BatchNorm))
    results = [train_step(model) for model in (plain, told)]
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
