"""Recorded answers of the references at the sizes of the published families, where such recordings are at hand.

The folders (environment variable MRL_REDIMNET_RECORDINGS, separated as in PATH) hold per recording NAME.json
(model_config and the tensors' names) and NAME.safetensors (waveforms and answers), and the first of them `seeded.py`,
which rebuilds the weights from the names. `test_convert.py` checks small configurations of every kind with answers that
are part of this repository.
"""

import importlib.util
import json
import os
from pathlib import Path

import pytest
import torch
from conftest import padded, reference_order, relative_error
from safetensors.torch import load_file

from masking_mrl_redimnet import whole_frames
from mrl_redimnet.convert import convert_checkpoint

SHARED = Path(__file__).resolve().parents[2] / "shared"
DEFAULT = os.pathsep.join(str(SHARED / name) for name in ("golden", "golden2"))
FOLDERS = [Path(folder) for folder in (os.environ.get("MRL_REDIMNET_RECORDINGS") or DEFAULT).split(os.pathsep)]
RECORDINGS = sorted(path for folder in FOLDERS for path in folder.glob("*.safetensors"))
LAYERS = ("features", "backbone", "pooled", "embedding")
LIMIT = 1e-4


def seeded_state_dict(description: Path) -> dict[str, torch.Tensor]:
    spec = importlib.util.spec_from_file_location("seeded", FOLDERS[0] / "seeded.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.seeded_state_dict(description)


def worst_errors(path: Path) -> dict[str, float]:
    """Per layer the largest relative error over the recorded waveforms, the backbone where it was recorded; and that of
    the embeddings where the waveforms, of two lengths, are one batch with noise as padding."""
    description = path.with_suffix(".json")
    model_config = json.loads(description.read_text())["model_config"]
    model = convert_checkpoint({"model_config": model_config, "state_dict": seeded_state_dict(description)})
    recorded = load_file(path)
    errors = dict.fromkeys(LAYERS, 0.0)
    count = sum(key.startswith("waveform_") for key in recorded)
    for i in range(count):
        with torch.inference_mode():
            features = model.front_end(recorded[f"waveform_{i}"])
            frames = model.trunk(whole_frames(features, None, model.config.time_strides()[-1])[0])
            pooled = model.pooling(frames, None)
            ours = {
                "features": features.transpose(1, 2),
                "backbone": reference_order(frames, model.config, model_config).transpose(1, 2),
                "pooled": reference_order(pooled, model.config, model_config),
                "embedding": model.projection(pooled),
            }
        for layer, value in ours.items():
            if f"{layer}_{i}" in recorded:
                expected = recorded[f"{layer}_{i}"]
                expected = expected.flatten(1, 2) if expected.dim() == 4 else expected  # [B, c, f, T] to [B, c f, T]
                errors[layer] = max(errors[layer], relative_error(value, expected))
            else:
                errors.pop(layer, None)
    batch = padded([recorded[f"waveform_{i}"][0] for i in range(count)], extra=1000, garbage=1.0)
    with torch.inference_mode():
        together = model(**batch).embeddings
    rows = [relative_error(row, recorded[f"embedding_{i}"][0]) for i, row in enumerate(together)]
    return {**errors, "padded": max(rows)}


@pytest.mark.skipif(not RECORDINGS, reason=f"no recordings in {FOLDERS} (set MRL_REDIMNET_RECORDINGS to their folders)")
@pytest.mark.slow
def test_recorded_answers(capsys):
    table = {path.stem: worst_errors(path) for path in RECORDINGS}
    columns = (*LAYERS, "padded")
    with capsys.disabled():
        print(f"\n\n{'relative error':24}" + "".join(f"{column:>11}" for column in columns))
        for name, errors in table.items():
            print(f"{name:24}" + "".join(f"{errors[x]:11.1e}" if x in errors else f"{'-':>11}" for x in columns))
    worst = {f"{name} {layer}": error for name, errors in table.items() for layer, error in errors.items()}
    assert {where: error for where, error in worst.items() if not error <= LIMIT} == {}
