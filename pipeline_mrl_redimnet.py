"""Speaker verification through transformers' `pipeline`. Travels beside the weights to the Hub.

verifier = pipeline(model="me/redimnet-mrl-nano", trust_remote_code=True)
verifier("a.wav")                                            # the embedding, [256]
verifier(("a.wav", "b.wav"))                                 # {"score": ..., "accepted": ..., ...}
verifier({"enrol": ["a1.wav", "a2.wav"], "test": "b.wav"})   # the mean of two utterances against one
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from transformers.pipelines.base import ChunkPipeline
from transformers.utils import logging

logger = logging.get_logger(__name__)


class SpeakerVerificationPipeline(ChunkPipeline):
    """Embeds an utterance, or decides whether two sides are of one speaker.

    An utterance is whatever `MRLReDimNetFeatureExtractor` takes: a path, a URL, bytes, a waveform at the model's
    sampling rate, a row of a data set's audio column. An input is an utterance; or a pair (enrolment, test), as a tuple
    or as {"enrol": ..., "test": ...}, where the enrolment may be a list of utterances of one speaker, which are
    averaged. A list of inputs gives a list of answers.

    Keyword arguments, of the pipeline or of a call:
        truncate_dim: how many numbers of the embeddings are used, one of `model.config.matryoshka_dims` [all].
        threshold: accept scores from this one on; None: the one saved in thresholds.json beside the weights.
        batch_size: utterances that go through the network at once [1].

    Answers:
        of an utterance: its embedding, float32 [truncate_dim];
        of a pair: a dict of `score` (cosine), `accepted` (None where there is no threshold), `threshold` and `dim`.
    """

    _load_tokenizer = False
    _load_image_processor = False
    _load_video_processor = False
    _load_feature_extractor = True
    _load_processor = False

    def _sanitize_parameters(
        self, truncate_dim: int | None = None, threshold: float | None = None, **unknown: Any
    ) -> tuple[dict, dict, dict]:
        if unknown:
            raise TypeError(f"SpeakerVerificationPipeline has no argument {', '.join(unknown)}.")
        given = {} if threshold is None else {"threshold": threshold}
        return {}, {}, given if truncate_dim is None else {**given, "truncate_dim": truncate_dim}

    def preprocess(self, inputs: Any) -> Iterator[dict[str, Any]]:
        """An input -> the utterances of it, the enrolled ones first."""
        pair = isinstance(inputs, tuple) or (isinstance(inputs, Mapping) and ("enrol" in inputs or "test" in inputs))
        sides = [inputs]
        if pair:
            found = (inputs.get("enrol"), inputs.get("test")) if isinstance(inputs, Mapping) else inputs
            if len(found) != 2 or any(side is None for side in found):
                raise ValueError(
                    "A pair is (enrolment, test) or {'enrol': ..., 'test': ...}, where the enrolment may be a list of "
                    f"utterances; got {len(found)} sides{'' if len(found) != 2 else ', one of them missing'}."
                )
            enrolled, tested = found
            sides = [*(enrolled if isinstance(enrolled, list) else [enrolled]), tested]
            if len(sides) == 1:
                raise ValueError("enrol: an empty list, expected at least one utterance.")
        for number, utterance in enumerate(sides, start=1):
            where = ("test" if number == len(sides) else f"enrol[{number - 1}]") if pair else "the input"
            rate = self.feature_extractor.sampling_rate
            wave = self.feature_extractor.waveform(utterance, rate, where)
            known = {"is_last": number == len(sides), "pair": pair, "seconds": len(wave) / rate}
            yield {**known, **self.feature_extractor(wave, sampling_rate=rate)}

    def _forward(self, model_inputs: dict[str, Any]) -> dict[str, Any]:
        known = {name: model_inputs.pop(name) for name in ("is_last", "pair", "seconds")}
        return {"embedding": self.model(**model_inputs).embeddings.float(), **known}

    def postprocess(
        self, outputs: list[dict[str, Any]], truncate_dim: int | None = None, threshold: float | None = None
    ) -> np.ndarray | dict[str, Any]:
        """The embeddings of an input's utterances -> the answer."""
        self.model.check_prefix(truncate_dim)
        dim = self.model.config.embedding_size if truncate_dim is None else truncate_dim
        embeddings = torch.cat([output["embedding"] for output in outputs])[:, :dim]
        if not outputs[0]["pair"]:
            return embeddings[0].numpy()
        units = F.normalize(embeddings)
        score = float(F.cosine_similarity(units[:-1].mean(0), units[-1], dim=0))
        if threshold is None:
            *enrolled, tested = (output["seconds"] for output in outputs)
            threshold = self.saved_threshold(dim, len(enrolled), (sum(enrolled), tested))
        accepted = None if threshold is None else score >= threshold
        return {"score": score, "accepted": accepted, "threshold": threshold, "dim": dim}

    def saved_threshold(self, dim: int, enrolments: int, seconds: tuple[float, float]) -> float | None:
        """The threshold of thresholds.json for cosines of `dim` numbers with so many utterances averaged, or the next
        larger number of them, else the largest; `seconds` are those of both sides. None without one, and for a model
        with an adapter on it, which would need its own.
        """
        if not hasattr(self, "_thresholds"):
            self._thresholds = [] if hasattr(self.model, "peft_config") else self._read_thresholds()
        fitting = {entry["enrolments"]: entry for entry in self._thresholds if entry["dim"] == dim}
        if not fitting:
            return None
        entry = fitting[min((n for n in fitting if n >= enrolments), default=max(fitting))]
        calibration = entry["calibration"]
        if calibration["seconds"] is None:
            return entry["threshold"]
        # A log-likelihood ratio: the cosine that has it at these durations.
        shorter, longer = np.log(np.sort(np.clip(seconds, *calibration["seconds"])))
        offset = calibration["offset"] + calibration["shorter"] * shorter + calibration["longer"] * longer
        slope = calibration["slope"] + calibration.get("steeper", 0.0) * shorter
        return float((entry["threshold"] - offset) / slope)

    def _read_thresholds(self) -> list[dict[str, Any]]:
        """The saved thresholds of the model itself, on cosines."""
        name, source = "thresholds.json", self.model.name_or_path
        if Path(source).is_dir():
            file = Path(source, name)
        else:
            revision = getattr(self.model.config, "_commit_hash", None)  # that of the weights
            try:
                file = Path(hf_hub_download(source, name, revision=revision))
            except (EntryNotFoundError, HfHubHTTPError) as error:
                logger.warning(f"{source}: no {name} was found ({type(error).__name__}), so nothing is decided.")
                return []
        if not file.is_file():
            return []
        entries = json.loads(file.read_text(encoding="utf-8"))["entries"]
        return [
            {"enrolments": 1, **entry} for entry in entries if entry["adapter"] is None and entry["scorer"] == "cosine"
        ]


# What config.json says of it, so that `pipeline(model=...)` finds it.
CUSTOM_PIPELINES = {
    "speaker-verification": {
        "impl": f"pipeline_mrl_redimnet.{SpeakerVerificationPipeline.__name__}",
        "pt": ["AutoModel"],
        "type": "audio",
    }
}

__all__ = ["SpeakerVerificationPipeline"]
