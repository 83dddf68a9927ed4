"""Names and values of the package that the command line shows and checks without importing it.

Importing `mrl_redimnet` imports torch, which takes seconds; help and usage errors should not wait for that. A test
compares every entry with the package's own.
"""

import json
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).parents[1] / "mrl_redimnet"

# The choices of options, by the place in `mrl_redimnet` that defines them.
CHOICES = {
    "scoring.trials.FORMATS": ("voxceleb", "kaldi", "cnceleb", "sitw"),
    "scoring.scorers.SCORERS": ("cosine", "centred", "as_norm", "centred_as_norm"),
    "audio.domains.DOMAINS": ("clean", "noisy", "telephony"),
    "extraction.bulk.STORAGES": ("float32", "float16"),
    "export.PRECISIONS": ("float32", "float16", "int8"),
    "export.ADAPTER_PLACEMENTS": ("attention", "attention+ffn", "pointwise", "projection", "linear"),
    "export.TARGETS": ("onnx", "onnx-weights", "torch", "onnx-adapter", "browser"),
    "adapters.combining.METHODS": (
        "cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", "ties_svd", "dare_linear_svd",
        "dare_ties_svd", "magnitude_prune_svd",
    ),
    "data.prepare.EXPECTED": (
        "voxceleb1-dev", "voxceleb1-test", "voxceleb2-dev", "voxceleb2-test", "cnceleb2", "voxblink2",
    ),
    "evaluation.robustness.PERTURBATIONS": (
        "noise", "white_noise", "reverberation", "codec", "bandwidth", "speed", "duration", "clipping",
    ),
}  # fmt: skip

# Default values of options, and names of files, by the place that defines them.
VALUES = {
    "scoring.scorers.TOP": 300,
    "extraction.bulk.PART_SIZE": 512,
    "encoder.BATCH_SECONDS": 60.0,
    "evaluation.robustness.RESAMPLES": 200,
    "data.corpus.DEFAULT_LAYOUT": "speaker/session/utterance",
    "diarization.plda.LDA_DIM": 128,
    "diarization.plda.PIECE_SECONDS": 3.0,
    "scoring.calibration.THRESHOLDS_FILE": "thresholds.json",
    "scoring.decisions.ENROL_SECONDS": 2.0,
    "evaluation.robustness.REPORT": "robustness.json",
    "evaluation.robustness.PICTURE": "robustness.png",
    "serving.batcher.WAIT_MS": 10.0,
    "serving.batcher.BATCH_SECONDS": 60.0,
    "serving.batcher.QUEUE_SECONDS": 600.0,
}


@cache
def published_names() -> tuple[str, ...]:
    """The published checkpoints by OWNER/NAME, and by NAME alone."""
    releases = json.loads((PACKAGE / "published.json").read_text(encoding="utf-8"))["releases"]
    ids = [(owner, name) for owner, release in releases.items() for name in release["checkpoints"]]
    return (*(f"{owner}/{name}" for owner, name in ids), *dict.fromkeys(name for _, name in ids))


def packaged_names() -> tuple[str, ...]:
    """The models that come with the package."""
    return tuple(file.parent.name for file in sorted(PACKAGE.glob("models/*/config.json")))


def model_names() -> tuple[str, ...]:
    """The models that a name stands for: those that come with the package, and the published checkpoints."""
    return (*packaged_names(), *published_names())


def adapter_names() -> tuple[str, ...]:
    """The adapters that come with the package."""
    return tuple(file.parent.name for file in sorted(PACKAGE.glob("models/*/adapter_config.json")))
