"""Recorded answers of the reference at the sizes of the published families, where such recordings are at hand.

The folder (environment variable MRL_REDIMNET_RECORDINGS) holds per recording NAME.json (model_config and the tensors'
names), NAME.safetensors (waveforms and answers) and `seeded.py`, which rebuilds the weights from the names.
`test_convert.py` checks small configurations of every kind with answers that are part of this repository.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import relative_error
from safetensors.torch import load_file

from mrl_redimnet.convert import convert_checkpoint

FOLDER = Path(os.environ.get("MRL_REDIMNET_RECORDINGS") or Path(__file__).resolve().parents[2] / "shared" / "golden")
NAMES = sorted(path.stem for path in FOLDER.glob("*.safetensors"))
LAYERS = ("features", "backbone", "pooled", "embedding")
LIMIT = 1e-4


def seeded_state_dict(description: Path) -> dict[str, torch.Tensor]:
    spec = importlib.util.spec_from_file_location("seeded", FOLDER / "seeded.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.seeded_state_dict(description)


def worst_errors(name: str) -> dict[str, float]:
    """Per layer the largest relative error over the recorded waveforms; the backbone where it was recorded."""
    description = FOLDER / f"{name}.json"
    model_config = json.loads(description.read_text())["model_config"]
    model = convert_checkpoint({"model_config": model_config, "state_dict": seeded_state_dict(description)})
    recorded = load_file(FOLDER / f"{name}.safetensors")
    errors = dict.fromkeys(LAYERS, 0.0)
    for i in range(sum(key.startswith("waveform_") for key in recorded)):
        with torch.inference_mode():
            features = model.front_end(recorded[f"waveform_{i}"])
            frames = model.trunk(features)
            pooled = model.pooling(frames, None)
            ours = (features.transpose(1, 2), frames.transpose(1, 2), pooled, model.projection(pooled))
        for layer, value in zip(LAYERS, ours, strict=True):
            if f"{layer}_{i}" in recorded:
                errors[layer] = max(errors[layer], relative_error(value, recorded[f"{layer}_{i}"]))
            else:
                errors.pop(layer, None)
    return errors


@pytest.mark.skipif(not NAMES, reason=f"no recordings in {FOLDER} (set MRL_REDIMNET_RECORDINGS to their folder)")
def test_recorded_answers(capsys):
    table = {name: worst_errors(name) for name in NAMES}
    with capsys.disabled():
        print(f"\n\n{'relative error':24}" + "".join(f"{layer:>11}" for layer in LAYERS))
        for name, errors in table.items():
            print(f"{name:24}" + "".join(f"{errors[x]:11.1e}" if x in errors else f"{'-':>11}" for x in LAYERS))
    worst = {f"{name} {layer}": error for name, errors in table.items() for layer, error in errors.items()}
    assert {where: error for where, error in worst.items() if not error <= LIMIT} == {}
