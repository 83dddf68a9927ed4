"""Is it one speaker? An exported model, numpy, soundfile and onnxruntime; no PyTorch and nothing of this package.

mrl-redimnet export MODEL --to onnx --out model.onnx
python examples/embed_with_onnxruntime.py model.onnx a.wav b.wav
"""

import json
import math
import sys

import numpy as np
import onnxruntime
import soundfile

session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
facts = session.get_modelmeta().custom_metadata_map
rate, shortest, window = (float(facts[name]) for name in ("sampling_rate", "min_samples", "window_seconds"))


def embed(path: str) -> np.ndarray:
    """The embedding [D] of an audio file; one longer than the model's window is cut into equal parts."""
    audio, file_rate = soundfile.read(path, dtype="float32", always_2d=True)
    if file_rate != rate or len(audio) < shortest:
        sys.exit(f"{path}: {len(audio)} samples at {file_rate} Hz, expected {shortest:g} or more at {rate:g} Hz.")
    count = math.ceil(len(audio) / (window * rate))
    parts = np.split(audio.mean(axis=1), [i * len(audio) // count for i in range(1, count)])
    names = [each.name for each in session.get_inputs()]  # a file made with --no-mask takes no mask
    feeds = ({"input_values": part[None], "attention_mask": np.ones((1, len(part)), np.int64)} for part in parts)
    return np.mean([session.run(None, {name: feed[name] for name in names})[0][0] for feed in feeds], axis=0)


a, b = (embed(path) for path in sys.argv[2:4])
known = [each for each in json.loads(facts["thresholds"]) if each["scorer"] == "cosine"]
known = [each for each in known if each.get("enrolments", 1) == 1]  # two files are compared, nothing is averaged
known = [each for each in known if (each["adapter"] or "") == facts["adapter"] and not each["calibration"]["seconds"]]
thresholds = {each["dim"]: each["threshold"] for each in known}
for dim in json.loads(facts["dims"]):
    cosine = a[:dim] @ b[:dim] / np.linalg.norm(a[:dim]) / np.linalg.norm(b[:dim])
    decision = "" if dim not in thresholds else "  same" if cosine >= thresholds[dim] else "  different"
    print(f"{dim:4d} dimensions: cosine {cosine:.4f}{decision}")
