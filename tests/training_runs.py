"""Runs of the training script: a model and a corpus so small that a run takes a second, here or in other processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
from accelerate.state import AcceleratorState, GradientState

import train_hf

SCRIPT = Path(train_hf.__file__)
TINY = (
    "{num_mel_bins: 24, base_channels: 4, group_divisor: 4, embedding_size: 32, matryoshka_dims: [8, 16, 32], "
    "pooling_bottleneck: 16, spec_augment: true, map_dropout: 0.1, "
    "stages: [{frequency_stride: 2, blocks: 1, expansion: 1, reduction: 8}]}"
)
ALONE = {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def as_tests(corpus: Path, **more: str) -> dict:
    """The trial list of a corpus as the test of a run."""
    test = {"trials": "test/trials.txt", "folder": "test/wav", **more}
    return {"synthetic": {key: str(corpus / path) for key, path in test.items()}}


def command_line(corpus: Path, output: Path, *flags: str, **settings) -> list[str]:
    """A run of a second: 4 crops of half a second a step, for a model of 19,000 parameters."""
    tests = json.dumps(as_tests(corpus))
    small = dict(model_options=TINY, train=corpus / "train", noise=corpus / "test/wav", tests=tests)
    small |= dict(dev_speakers=2, crop_seconds=0.5, batch_size=4, steps=2, workers=0, bootstrap_samples=20, log_every=1)
    small |= dict(rotate_at=[])  # of sixteen utterances there is no one principal basis
    settings = {**small, "tracker": "none", "output": output, **settings}
    return [*(f"--{key}={value}" for key, value in settings.items()), *flags]


def reset_accelerate():
    """Accelerate keeps the first Accelerator's settings for the whole process; after this the next one sets its own."""
    AcceleratorState._reset_state(True)  # noqa: SLF001 -- no public way, and Accelerate's own tests do the same
    GradientState._reset_state()  # noqa: SLF001 -- as above


def train_here(argv: list[str]):
    """The script's main in this process, as if it were the first run of it."""
    reset_accelerate()
    try:
        train_hf.main(argv)
    finally:
        reset_accelerate()


def start(corpus: Path, argv: list[str], *, processes: int = 1, script: Path = SCRIPT) -> subprocess.Popen:
    """The script in processes of its own, without an accelerator: there the same steps give the same bits."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    launcher += ["--log-dir", str(corpus.parent / "elastic")]
    return subprocess.Popen(
        [sys.executable, *(launcher if processes > 1 else []), str(script), *argv],
        env={**os.environ, **ALONE, "HF_DATASETS_CACHE": str(corpus.parent / "cache")},
        cwd=corpus.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def finish(process: subprocess.Popen) -> str:
    printed, _ = process.communicate(timeout=300)
    assert process.returncode == 0, printed
    return printed


def results_of(output: Path) -> dict:
    return json.loads((output / "results.json").read_text())


def killed_when(process: subprocess.Popen, seen: Callable[[], bool]):
    """Kills the process and its children, as an empty battery would, as soon as something is seen."""
    deadline = time.monotonic() + 240
    while not seen():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.002)
    family = [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
    for member in reversed(family):  # torchrun's processes are in sessions of their own
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def trained_steps(output: Path) -> int:
    file = output / "history.jsonl"
    return sum('"train"' in line for line in file.read_text().splitlines()) if file.exists() else 0
