"""Small models and waveforms for the tests (`from conftest import tiny_config, tiny_model, waves`), the fixtures of
several test files, and how the tests are run: offline, with one thread a process, with the same examples every time."""

import csv
import gc
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

# Before the libraries that read these: no network but the tests' own Hub, no file of the user's home, one thread.
os.environ.update(HF_HOME=tempfile.mkdtemp(prefix="hf-of-tests-"), HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


import numpy as np
import pytest
import torch
from huggingface_hub import constants, hf_api
from hypothesis import settings
from local_hub import ANNA, BERT, READER, LocalHub
from sounds import write_speaker

from configuration_mrl_redimnet import MRLReDimNetConfig
from modeling_mrl_redimnet import MRLReDimNetForXVector, MRLReDimNetModel
from mrl_redimnet.adapters.publishing import save_adapter
from mrl_redimnet.saving import save_model
from mrl_redimnet.scoring.trials import make_trials, write_trials
from mrl_redimnet.speed import linear, loss, norms

torch.set_num_threads(1)


# ---------------------------------------------------------------- how the tests are run

settings.register_profile("fast", max_examples=20, deadline=None, derandomize=True, database=None)
settings.register_profile("ci", settings.get_profile("fast"), max_examples=200)  # --hypothesis-profile=ci
settings.load_profile("fast")


def at_most(examples: int) -> settings:
    """For a property whose examples take long: the profile's number of examples, but no more than this."""
    return settings(max_examples=min(examples, settings().max_examples))


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: a process for each core that this one may use. Each takes 2 GB of memory, so no more than eight."""
    return min(len(os.sched_getaffinity(0)), 8)


def pytest_report_header(config: pytest.Config) -> str:
    """What is run, and how to run the rest."""
    chosen = config.option.markexpr
    tier = "all tests" if not chosen else f"tests that are '{chosen}' (`make test-all`: all of them)"
    workers = config.getoption("numprocesses", None) or "no"
    examples = settings().max_examples
    return f"tier: {tier}; {workers} workers beside this process; {examples} examples of each property"


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """The tests of pyannote.audio are slow ones, all of them: its import alone takes 15 s in each worker."""
    return True if collection_path.name == "test_pyannote.py" and config.option.markexpr == "not slow" else None


def pytest_collection_finish(session: pytest.Session):
    """Spares every later collection of garbage the half a million objects of the imported libraries."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before the fixtures
def pytest_runtest_setup(item: pytest.Item):
    """A test that draws draws the same, whatever was run before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_unconfigure(config: pytest.Config):
    """Removes the home that the Hugging Face libraries had."""
    gc.unfreeze()
    shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)


# ---------------------------------------------------------------- processes


def run_alone(code: str, *arguments: object, folder: Path, libraries: Sequence[Path] = ()) -> str:
    """What Python code prints in a process of its own, in `folder`, without this one's paths and caches, offline.

    libraries: folders of shared libraries that it finds before those of the machine.
    """
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH", "HOME") if name in os.environ}
    environment |= {"HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if libraries:
        environment["LD_LIBRARY_PATH"] = os.pathsep.join(map(str, libraries))
    command = [sys.executable, "-I", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


# ---------------------------------------------------------------- models and waveforms


def stages(*rows: tuple) -> list[dict]:
    """Rows (frequency stride, blocks, expansion, reduction) as a configuration's records; a stride may be a pair of
    (frequency stride, time stride)."""
    records = []
    for stride, *row in rows:
        frequency, time = stride if isinstance(stride, tuple) else (stride, 1)
        names = ("frequency_stride", "blocks", "expansion", "reduction")
        records.append(dict(zip(names, (frequency, *row), strict=True)) | ({"time_stride": time} if time > 1 else {}))
    return records


# 1-D blocks are 24 wide: below 20 `conv_time` takes another path than in any network of use.
TINY = dict(
    num_mel_bins=24,
    base_channels=4,
    stages=stages((1, 1, 1, None), (2, 1, 1, 4)),
    group_divisor=2,
    pooling_bottleneck=16,
    embedding_size=32,
    matryoshka_dims=[8, 16, 32],
    num_speakers=5,
)
EXPANDED = stages((1, 1, 2, None), (2, 1, 2, 4))

# Maps of 1, 2, 2 and 4 frames a frame, expansions up and down.
REDIMNET2 = dict(
    network="redimnet2",
    block_2d="basic_resnet",
    group_divisor=1,
    grouped_strides=True,
    stages=stages((1, 1, 2, 4), ((2, 2), 1, 1, None), ((2, 1), 1, 0.5, 4), ((1, 2), 1, 0.75, 4)),
)

# What to change in TINY to have every kind of block, pooling, norm and front end in one model at least.
VARIANTS: dict[str, dict] = {
    "convnext_convatt": {},
    "convnext_conv": dict(block_1d="conv", stages=EXPANDED),
    "convnext_relu_att": dict(block_1d="att", block_2d="convnext_like_relu", group_divisor=None),
    "resnet_fc": dict(block_1d="fc", block_2d="basic_resnet", stages=EXPANDED),
    "resnet_ungrouped": dict(block_1d="att", block_2d="basic_resnet", group_divisor=None),
    "fwse_att": dict(block_1d="att", block_2d="basic_resnet_fwse", stages=EXPANDED),
    "aggregation": dict(block_1d="fc", aggregation_channels=40),
    "astp_without_context": dict(block_1d="fc", pooling_context=False),
    "tap": dict(block_1d="fc", pooling="TAP"),
    "tsdp": dict(block_1d="fc", pooling="TSDP"),
    "tstp_embedding_norm": dict(block_1d="fc", pooling="TSTP", embedding_norm=True),
    "norm_mean_variance": dict(block_1d="fc", feature_norm="mean_variance", normalize_signal=True),
    "norm_batch": dict(block_1d="fc", feature_norm="batch"),
    "norm_none": dict(block_1d="fc", feature_norm="none", preemphasis=False),
    "hop_240": dict(block_1d="fc", hop_length=240),
    "tf_mel": dict(front_end="tf_mel"),
    "tf_mel_normalized": dict(block_1d="fc", front_end="tf_mel", normalize_signal=True, hop_length=120),
    "redimnet2": dict(REDIMNET2, front_end="tf_mel", normalize_signal=True),
    "redimnet2_normed": dict(REDIMNET2, map_norm_groups=4, aggregation_channels=5, aggregation_per_bin=True),
    "redimnet2_dual": dict(REDIMNET2, map_norm_groups=8, dual_maps=True, block_1d="conv"),
    "redimnet2_ungrouped": dict(REDIMNET2, grouped_strides=False, dual_maps=True, block_2d="basic_resnet_fwse"),
    "redimnet2_convnext": dict(
        REDIMNET2,
        block_1d="att",
        block_2d="convnext_like",
        map_norm_groups=1,
        aggregation_channels=40,
        stages=[
            dict(stages(((2, 2), 1, 2, None))[0], kernels=[[3, 5], [7, 1]]),
            *stages(((1, 3), 1, 1, 4)),
        ],
    ),
}


def tiny_config(variant: str = "convnext_convatt", **overrides) -> MRLReDimNetConfig:
    """The configuration of one of VARIANTS, single fields replaced."""
    return MRLReDimNetConfig(**{**TINY, **VARIANTS[variant], **overrides})


def tiny_model(config: MRLReDimNetConfig | None = None, seed: int = 0, kind: type = MRLReDimNetModel):
    """A model in eval mode that looks trained: its norms, running statistics and mixing weights are not at the start.

    With fresh ones many mistakes (a norm left out, a map mixed wrongly) would change nothing.
    """
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        model = kind(config or tiny_config())
        for module in model.modules():
            if isinstance(module, (torch.nn.BatchNorm1d, torch.nn.LayerNorm, torch.nn.GroupNorm)):
                module.weight.uniform_(0.5, 1.5)
                module.bias.normal_(std=0.2)
            if isinstance(module, torch.nn.BatchNorm1d):
                module.running_mean.normal_(std=0.2)
                module.running_var.uniform_(0.5, 1.5)
        for name, parameter in model.named_parameters():
            if name.endswith("mix.logits"):
                parameter.normal_()
    return model.eval()


def waves(*lengths: int, seed: int = 0) -> list[torch.Tensor]:
    """Utterances of noise, each with its own loudness and colour."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i, length in enumerate(lengths):
        noise = torch.randn(length, generator=generator)
        made.append(0.05 * (1 + i) * (noise + 0.9 * torch.cat([torch.zeros(1), noise[:-1]])))
    return made


def padded(utterances: list[torch.Tensor], extra: int = 0, garbage: float = 0.0) -> dict[str, torch.Tensor]:
    """A batch {input_values, attention_mask}, `extra` samples longer than it must be, noise of a size as padding."""
    longest = max(map(len, utterances)) + extra
    values = garbage * torch.randn(len(utterances), longest, generator=torch.Generator().manual_seed(1))
    mask = torch.zeros(len(utterances), longest, dtype=torch.int32)
    for row, utterance in enumerate(utterances):
        values[row, : len(utterance)] = utterance
        mask[row, : len(utterance)] = 1
    return {"input_values": values, "attention_mask": mask}


def relative_error(ours: torch.Tensor, expected: torch.Tensor) -> float:
    """|ours - expected| / |expected|."""
    return ((ours.double() - expected.double()).norm() / expected.double().norm()).item()


def reference_order(ours: torch.Tensor, config: MRLReDimNetConfig, model_config: dict) -> torch.Tensor:
    """Pooled statistics, or what is pooled, with channels as the reference has them: outside of bins where it pools 2-D
    maps. ours [..., statistics * channels]."""
    if not model_config.get("return_2d_output"):
        return ours
    *_, bins = config.stage_shapes()[-1]
    return ours.unflatten(-1, (-1, bins, config.pooling_input // bins)).transpose(-1, -2).flatten(-3)


@pytest.fixture
def model() -> MRLReDimNetModel:
    """A small model of the usual kind, its own for each test."""
    return tiny_model()


@pytest.fixture
def device(monkeypatch) -> torch.device:
    """The GPU for the tests in `tests/gpu`, which are skipped where there is none.

    MRL_TEST_DEVICE=cpu runs them on the CPU, by the operators that a GPU would run: to see that the tests work.
    """
    name = os.environ.get("MRL_TEST_DEVICE", "cuda")
    if name == "cuda" and not torch.cuda.is_available():
        pytest.skip("no GPU: torch.cuda.is_available() is false (MRL_TEST_DEVICE=cpu runs these tests on the CPU)")
    if name == "cpu":
        for module in (linear, loss, norms):
            monkeypatch.setattr(module, "runs_on_cpu", lambda x: False)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)  # convolutions with all of float32's digits
    return torch.device(name)


def enable_checkpointing(model, *options, **more):
    """Gradient checkpointing, by the name it has from transformers 5.23 on, or else by the one it had before."""
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)(*options, **more)


def leave_together(rank: int, folder: str, results: dict):
    """Writes a process's results, and ends its group when both processes have: one that leaves while the other still
    reads its last message can keep that one waiting for ever."""
    torch.save(results, f"{folder}/{rank}.part")
    os.replace(f"{folder}/{rank}.part", f"{folder}/{rank}.pt")
    deadline = time.monotonic() + 120
    while not os.path.exists(f"{folder}/{1 - rank}.pt") and time.monotonic() < deadline:
        time.sleep(0.01)
    torch.distributed.destroy_process_group()


# ---------------------------------------------------------------- fixtures of several files


@pytest.fixture
def connected(monkeypatch, tmp_path):
    """A Hub, which huggingface_hub in this process takes for its own; nobody is logged in, the cache is empty."""
    users = {ANNA: "anna", READER: "anna", BERT: "bert"}
    with LocalHub(users, readers=(READER,)) as hub:
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(
            constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}"
        )
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
        monkeypatch.setattr(hf_api.api, "endpoint", hub.url)
        monkeypatch.setattr(time, "sleep", lambda seconds: None)  # between a client's attempts
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield hub


@pytest.fixture
def hub(connected, monkeypatch):
    """The same, with anna logged in."""
    monkeypatch.setenv("HF_TOKEN", ANNA)
    return connected


@pytest.fixture
def folder(tmp_path) -> Path:
    """A saved model with a classifier."""
    save_model(tiny_model(kind=MRLReDimNetForXVector), tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture(scope="module")
def adapters(tmp_path_factory) -> Path:
    """A folder of adapters on the model of the fixture `folder`, of domains that are their names."""
    from mrl_redimnet.adapters import AdapterFacts, Base, fingerprint
    from mrl_redimnet.adapters.strategies import AdapterPlan, Probe, Vanilla

    root = tmp_path_factory.mktemp("adapters")
    for seed, (domain, rank) in enumerate({"telephony": 4, "noisy": 2}.items()):
        encoder = tiny_model(kind=MRLReDimNetForXVector).redimnet
        facts = AdapterFacts(domain, Base("me/base", None, fingerprint(encoder)), training=f"By {domain} seed {seed}.")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            strategy = Vanilla(encoder, AdapterPlan(steps=1, rank=rank), Probe(list, lambda batch: None))
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in strategy.peft.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5, generator=generator)
        save_adapter(strategy, facts, root / domain)
    return root


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """wav/ with eight speakers, and two trial lists with utterances in common: all.txt of all pairs, few.txt."""
    return _evaluated(tmp_path_factory.mktemp("evaluated"), (4000, 7000))


@pytest.fixture(scope="module")
def longer_speech(tmp_path_factory) -> Path:
    """As `speech`, with utterances of 0.7 to 5 s."""
    return _evaluated(tmp_path_factory.mktemp("longer"), (11_200, 80_000))


def _evaluated(root: Path, samples: tuple[int, int]) -> Path:
    for speaker in range(8):
        write_speaker(root / "wav", speaker, 4, samples=samples)
    paths = sorted(path.relative_to(root / "wav").as_posix() for path in (root / "wav").rglob("*.wav"))
    for name, chosen in {"all": paths, "few": paths[:14]}.items():
        write_trials(make_trials(chosen, [path.split("/")[0] for path in chosen]), root / f"{name}.txt")
    with (root / "speakers.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("speaker", "gender"), *((f"id{i}", "fm"[i % 2]) for i in range(8))])
    return root


@pytest.fixture
def train(corpus, tmp_path, monkeypatch):
    """Runs the script's main in this process: train(*flags, **settings), with its output in tmp_path/run. The
    test file has the fixture `corpus`."""
    import datasets
    from training_runs import command_line, train_here

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", corpus.parent / "cache")
    monkeypatch.setattr("mrl_redimnet.training.history.draw", lambda folder: None)  # half the time of so short a run

    def run(*flags, **settings) -> Path:
        train_here(command_line(corpus, tmp_path / "run", *flags, **settings))
        return tmp_path / "run"

    return run


@pytest.fixture
def seen_types(monkeypatch) -> set[torch.dtype]:
    """The types of what a linear layer gave in training."""
    from mrl_redimnet.training import setup

    types, describe = set(), setup.describe

    def describe_and_watch(run):
        describe(run)
        projection = next(part for name, part in run.model.named_modules() if name.endswith("projection.segments.0"))
        projection.register_forward_hook(lambda part, inputs, out: types.add(out.dtype) if part.training else None)

    monkeypatch.setattr(setup, "describe", describe_and_watch)
    return types
