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


def embed(path: str) -> tuple[np.ndarray, float]:
    """The embedding [D] of an audio file, and its seconds; one longer than the window is cut into equal parts."""
    audio, file_rate = soundfile.read(path, dtype="float32", always_2d=True)
    if file_rate != rate or len(audio) < shortest:
        sys.exit(f"{path}: {len(audio)} samples at {file_rate} Hz, expected {shortest:g} or more at {rate:g} Hz.")
    count = math.ceil(len(audio) / (window * rate))
    parts = np.split(audio.mean(axis=1), [i * len(audio) // count for i in range(1, count)])
    names = [each.name for each in session.get_inputs()]  # a file made with --no-mask takes no mask
    feeds = ({"input_values": part[None], "attention_mask": np.ones((1, len(part)), np.int64)} for part in parts)
    found = [session.run(None, {name: feed[name] for name in names})[0][0] for feed in feeds]
    return np.mean(found, axis=0), len(audio) / rate


def cosine_from(entry: dict, *seconds: float) -> float:
    """The cosine from which on two recordings of so many seconds are of one speaker, by a saved threshold."""
    calibration = entry["calibration"]
    if calibration["seconds"] is None:
        return entry["threshold"]
    # It is a log-likelihood ratio: the cosine that has it at these durations.
    shorter, longer = np.log(np.sort(np.clip(seconds, *calibration["seconds"])))
    offset = calibration["offset"] + calibration["shorter"] * shorter + calibration["longer"] * longer
    return (entry["threshold"] - offset) / (calibration["slope"] + calibration.get("steeper", 0.0) * shorter)


(a, seconds_of_a), (b, seconds_of_b) = (embed(path) for path in sys.argv[2:4])
known = [each for each in json.loads(facts["thresholds"]) if each["scorer"] == "cosine"]
known = [each for each in known if each.get("enrolments", 1) == 1]  # two files are compared, nothing is averaged
known = [each for each in known if (each["adapter"] or "") == facts["adapter"]]
thresholds = {each["dim"]: cosine_from(each, seconds_of_a, seconds_of_b) for each in known}
for dim in json.loads(facts["dims"]):
    cosine = a[:dim] @ b[:dim] / np.linalg.norm(a[:dim]) / np.linalg.norm(b[:dim])
    decision = "" if dim not in thresholds else "  same" if cosine >= thresholds[dim] else "  different"
    print(f"{dim:4d} dimensions: cosine {cosine:.4f}{decision}")
