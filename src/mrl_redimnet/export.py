"""Speaker encoders for runtimes without this package: ONNX files, adapters for them, and torch.export programs.

What is exported is one window: audio in, embeddings out, front end inside, batch and length free (or both fixed).
Longer audio is cut into windows outside, and their embeddings averaged, as `MRLReDimNetModel.forward` does (examples/
embed_with_onnxruntime.py shows it with numpy).
"""

import contextlib
import copy
import json
import logging
import math
import re
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.func import functional_call

from configuration_mrl_redimnet import FFT_SIZE, SAMPLING_RATE
from frontend_mrl_redimnet import MelFrontEnd
from modeling_mrl_redimnet import MRLReDimNetModel, MRLReDimNetPreTrainedModel
from mrl_redimnet.adapters.hub import local_folder
from mrl_redimnet.adapters.placement import PLACEMENTS
from mrl_redimnet.adapters.stored import read_adapter, scaling
from mrl_redimnet.extras import extra
from mrl_redimnet.files import replace_file, replace_folder
from mrl_redimnet.fingerprints import fingerprint, same_weights
from mrl_redimnet.scoring.calibration import Thresholds
from mrl_redimnet.speed import speed_up

if TYPE_CHECKING:
    import onnx

# How far an exported file's embeddings may be from the model's, relative to their length: it is broken beyond that.
PRECISIONS = {"float32": 1e-4, "float16": 0.02, "int8": 0.2}
ADAPTER_PLACEMENTS = tuple(name for name in PLACEMENTS if name not in ("conv", "all"))  # those of linear layers alone
CHANNEL_BLOCK = 16  # channels that onnxruntime's convolutions take at a time on AVX-512 and NEON; 8 on AVX2
FOLDED_BYTES = 2**30  # constants up to this size are computed at export
# What can be written: its suffix; "" is a folder.
TARGETS = {"onnx": ".onnx", "onnx-weights": ".onnx", "torch": ".pt2", "onnx-adapter": ".onnx_adapter", "browser": ""}
# The files of a folder for the browser, as transformers.js names them for its dtypes fp32, fp16 and q8.
BROWSER_FILES = {"float32": "model.onnx", "float16": "model_fp16.onnx", "int8": "model_quantized.onnx"}
FACTS_FILE = "mrl_redimnet.json"  # inside a torch.export file
# Entries of a configuration that mean nothing in a browser: Python classes, and where on this machine it came from.
UNSAID = ("auto_map", "architectures", "_name_or_path")
# The page in a folder for the browser.
BROWSER_PAGE = """---
library_name: transformers.js
---

# Speaker embeddings for transformers.js

Written by mrl-redimnet from {source}, for 16 kHz audio. The first numbers of an embedding are an
embedding, too: config.json has the sizes (`matryoshka_dims`), thresholds.json, where it is there, the decisions.

```js
import {{ AutoFeatureExtractor, AutoModel }} from "@huggingface/transformers";
const extractor = await AutoFeatureExtractor.from_pretrained(FOLDER_OR_HUB_ID);
const model = await AutoModel.from_pretrained(FOLDER_OR_HUB_ID, {{ dtype: "fp32" }}); // or fp16, q8
const {{ embeddings }} = await model(await extractor(samples)); // a Float32Array of mono audio at 16 kHz
```
"""


# ----------------------------------------------------------------------------------------------------------------------
# What a file knows


def export_facts(
    model: MRLReDimNetPreTrainedModel,
    *,
    base: str,
    revision: str | None = None,
    adapter: str | None = None,
    weights: str | None = None,
    thresholds: Thresholds | None = None,
) -> dict[str, str]:
    """What a file says about itself, by name; every value is text, those of several numbers JSON.

    base, revision: the model's Hub id and commit, or its folder's name. adapter: the name of one merged into `model`.
    weights: their name, as `SpeakerEncoder.fingerprint` has it, by default `model`'s fingerprint. thresholds: of the
    base or adapter; those of other weights are left out, but for those of adapters on this base where none is merged
    (`adapter_inputs` may put them on).
    """
    config = model.config
    weights = fingerprint(model) if weights is None else weights
    entries = [] if thresholds is None else thresholds.entries
    kept = [
        entry
        for entry in entries
        if same_weights(entry.weights, weights) or same_weights(entry.weights.rpartition("+sha256:")[0], weights)
    ]
    return {
        "base": base,
        "revision": revision or "",
        "weights": weights,
        "adapter": adapter or "",
        "dims": json.dumps(config.matryoshka_dims),
        "sampling_rate": str(SAMPLING_RATE),
        "min_samples": str(config.min_samples),
        "window_seconds": str(config.window_seconds),
        "thresholds": json.dumps([asdict(entry) for entry in kept]),
        "mrl_redimnet": version("mrl-redimnet"),
    }


def adapter_base_number(weights: str) -> int:
    """The base's fingerprint as the number an .onnx_adapter has room for: the first 31 bits of its hashes."""
    number = 0
    for start in re.findall(r"(?:sha256|config):([0-9a-f]{8})", weights):
        number ^= int(start, 16)
    return number >> 1


# ----------------------------------------------------------------------------------------------------------------------
# The network as a graph can have it


class _ConvolutionalFrontEnd(MelFrontEnd):
    """The front end with its power spectrum as one convolution with windowed cosines and sines.

    Every runtime has convolutions; many have no STFT, and onnxruntime's is slower.
    """

    def power_spectrum(self, x: torch.Tensor) -> torch.Tensor:
        x = x[:, self.margins[0] : x.shape[1] - self.margins[1]]
        spectrum = F.conv1d(x[:, None], self.basis, stride=self.config.hop_length)
        real, imaginary = spectrum.chunk(2, dim=1)
        return (real.square() + imaginary.square()).transpose(1, 2)

    @classmethod
    def adopt(cls, front_end: MelFrontEnd) -> None:
        """Turns a front end into one of this kind."""
        samples = torch.arange(FFT_SIZE, dtype=torch.float64)
        angle = 2 * math.pi / FFT_SIZE * torch.arange(FFT_SIZE // 2 + 1, dtype=torch.float64)[:, None] * samples
        window = front_end.window.double()
        inside = window.nonzero()[:, 0]  # the window is shorter than the frame: zeros on one side of it or on both
        first, end = int(inside[0]), int(inside[-1]) + 1
        basis = torch.cat([angle.cos() * window, angle.sin() * window])[:, None, first:end]
        front_end.__class__, front_end.margins = cls, (first, FFT_SIZE - end)
        front_end.register_buffer("basis", basis.float(), persistent=False)


def _widen_groups(conv: nn.Conv2d) -> None:
    """The same convolution in fewer groups of `CHANNEL_BLOCK` channels, zeros between what were groups.

    onnxruntime has a fast kernel for groups of whole blocks, and none for groups of 4 channels: with four times the
    products it is faster. Depthwise convolutions have their own kernel.
    """
    narrow = conv.in_channels // conv.groups
    joined = CHANNEL_BLOCK // narrow
    if narrow == 1 or joined * narrow != CHANNEL_BLOCK or conv.groups % joined:
        return
    kernel = conv.weight.data.unflatten(0, (conv.groups // joined, joined, -1))  # [groups, joined, out, narrow, 3, 3]
    wide = kernel.new_zeros(*kernel.shape[:3], joined, *kernel.shape[3:])
    for i in range(joined):
        wide[:, i, :, i] = kernel[:, i]
    conv.weight = nn.Parameter(wide.flatten(3, 4).flatten(0, 2))
    conv.groups //= joined


def graph_form(model: MRLReDimNetPreTrainedModel) -> MRLReDimNetModel:
    """A copy of `model`'s encoder, with the same answers, in the form that is exported to ONNX."""
    encoder = _encoder(model)
    _ConvolutionalFrontEnd.adopt(encoder.front_end)
    for part in encoder.modules():
        if isinstance(part, nn.Conv2d):
            _widen_groups(part)
    return encoder


def _encoder(model: MRLReDimNetPreTrainedModel) -> MRLReDimNetModel:
    """A copy of the encoder to change freely, in eval mode and float32 on the CPU."""
    if not isinstance(model, MRLReDimNetPreTrainedModel) or any(isinstance(p, BaseTunerLayer) for p in model.modules()):
        raise ValueError(
            f"export takes a plain model, got {type(model).__name__} or adapters inside it: "
            "AdapterBank.merged gives one with an adapter folded in."
        )
    # Their norms are folded into the layers before them.
    return speed_up(copy.deepcopy(model.base_model).eval().requires_grad_(False).float().cpu())


class _AdaptableLinear(nn.Module):
    """A linear layer with a place for LoRA factors: x (W + B A)^T + bias; A [r, in], B [out, r]."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = nn.Parameter(linear.weight.data.T.contiguous())
        self.bias = linear.bias
        # Rank 3 is for tracing alone: a graph traced with 1 would know no other.
        self.lora_A = nn.Parameter(linear.weight.new_zeros(3, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = x @ (self.weight + self.lora_A.T @ self.lora_B.T)
        return y if self.bias is None else y + self.bias


class _Window(nn.Module):
    """input_values [B, T], lengths [B] or None -> embeddings [B, D] float32."""

    def __init__(self, encoder: MRLReDimNetModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_values: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
        return self.encoder.projection(self.encoder.pooled(input_values, lengths)).float()


class _Exported(nn.Module):
    """input_values [B, T], attention_mask [B, T] -> embeddings [B, D] float32, with `factors` as the LoRA's.

    min_samples: the shortest T [the model's].
    """

    def __init__(self, encoder: MRLReDimNetModel, min_samples: int | None = None) -> None:
        super().__init__()
        self.window = _Window(encoder)
        self.min_samples = encoder.config.min_samples if min_samples is None else min_samples

    def forward(
        self,
        input_values: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        factors: dict[str, torch.Tensor] | None = None,
    ) -> torch.Tensor:
        require = torch._check  # noqa: SLF001 -- what torch.export's manual says to bound sizes by
        require(input_values.shape[1] >= self.min_samples)
        lengths = None
        if attention_mask is not None:
            require(attention_mask.shape[0] == input_values.shape[0])
            require(attention_mask.shape[1] == input_values.shape[1])
            lengths = attention_mask.sum(1)
        if factors is None:
            return self.window(input_values, lengths)
        places = {f"encoder.{name}": value for name, value in factors.items()}
        return functional_call(self.window, places, (input_values, lengths))


def _example(
    encoder: MRLReDimNetModel, mask: bool, factors: dict[str, torch.Tensor], samples: int | None = None
) -> tuple[dict, dict | None]:
    """Arguments to trace with, and which of their dimensions are free: none with `samples`, the length of the one."""
    if samples is not None:
        return {"input_values": torch.zeros(1, samples)}, None
    free, samples = torch.export.Dim.DYNAMIC, 2 * encoder.config.min_samples + encoder.config.hop_length
    arguments: dict = {"input_values": torch.zeros(2, samples)}
    shapes: dict = {"input_values": {0: free, 1: free}}
    if mask:
        arguments["attention_mask"], shapes["attention_mask"] = torch.ones(2, samples).long(), {0: free, 1: free}
    if factors:
        arguments["factors"] = factors
        shapes["factors"] = {name: {0 if name.endswith("lora_A") else 1: free} for name in factors}
    return arguments, shapes


# ----------------------------------------------------------------------------------------------------------------------
# ONNX


def export_onnx(
    model: MRLReDimNetPreTrainedModel,
    path: str | Path,
    *,
    precision: str = "float32",
    mask: bool = True,
    adapter_inputs: str | None = None,
    seconds: float | None = None,
    facts: dict[str, str] | None = None,
) -> Path:
    """Writes `model`'s encoder as an ONNX file; `model` stays as it is.

    Inputs: `input_values` [batch, samples] float32 at 16 kHz, `attention_mask` [batch, samples] int64, 1 = audio, 0 =
    padding behind it. Output: `embeddings` [batch, D] float32, whose first numbers are the shorter embeddings. In the
    file's metadata: `facts` (see `export_facts`) and the precision.

    Args:
        precision: "float32"; "float16", weights and trunk; "int8", weights of linear layers, whose inputs are rounded
            as they come (the range is that of the whole batch, so an utterance's neighbours matter a little). The
            front end and sums over time are float32 in all of them.
        mask: False leaves out `attention_mask`: faster, and only for batches without padding.
        adapter_inputs: one of `ADAPTER_PLACEMENTS`: the LoRA factors of these layers become optional inputs
            (`NAME.lora_A` [r, in], `NAME.lora_B` [out, r], any r; left out, they do nothing), for the files of
            `export_onnx_adapter`.
        seconds: a fixed length, for runtimes that want every shape known: input_values [1, seconds * 16000], no mask,
            embeddings [1, D], and the fact `samples`. The caller repeats shorter audio up to that length.

    Raises:
        ValueError: an unknown or impossible option, the `export` extra is not installed, or the file's answers are
            further from the model's than `PRECISIONS` allows (numbers too large for float16); no file is left then.
    """
    onnx = _require_onnx()
    if precision not in PRECISIONS:
        raise ValueError(f"precision: got {precision!r}, expected one of {', '.join(PRECISIONS)}.")
    if adapter_inputs is not None and adapter_inputs not in ADAPTER_PLACEMENTS:
        raise ValueError(f"adapter_inputs: got {adapter_inputs!r}, expected one of {', '.join(ADAPTER_PLACEMENTS)}.")
    if adapter_inputs is not None and precision != "float32":
        raise ValueError(f"adapter_inputs: only with precision float32, got {precision!r}.")
    if adapter_inputs is not None and seconds is not None:
        raise ValueError(
            "seconds: a file of a fixed length takes no adapters: merge one, and leave out adapter_inputs."
        )
    samples = None if seconds is None else fixed_samples(model, seconds)
    encoder = graph_form(model)
    factors = {} if adapter_inputs is None else _make_adaptable(encoder, adapter_inputs)
    if precision == "float16":
        _halve(encoder)
    graph = _traced(encoder, mask, factors, samples)
    if precision == "int8":
        graph = _quantised(graph)
    fixed = {} if samples is None else {"samples": str(samples)}
    for key, value in {"precision": precision, **fixed, **(facts or {})}.items():
        graph.metadata_props.add(key=key, value=value)

    def write(file: Path) -> None:
        onnx.save(graph, file)
        if not (found := deviation(model, file)) <= PRECISIONS[precision]:  # also where it is no number
            raise ValueError(
                f"precision {precision}: the embeddings of noise are {found:.2g} of their length from the model's, "
                f"expected at most {PRECISIONS[precision]:g}: {path} is not written. Use another precision."
            )

    replace_file(Path(path), write)
    return Path(path)


@torch.inference_mode()
def deviation(model: MRLReDimNetPreTrainedModel, file: str | Path) -> float:
    """The largest |file's - model's| / |model's| embedding, over two utterances of noise, one of them padded.

    A file of a fixed length is compared over one utterance of that length.
    """
    with extra("export"):
        from onnxruntime import InferenceSession, SessionOptions

    encoder, options = _encoder(model), SessionOptions()
    options.log_severity_level = 3  # not a warning for every optional input
    session = InferenceSession(file, options, providers=["CPUExecutionProvider"])
    accepts_mask = "attention_mask" in [each.name for each in session.get_inputs()]
    shortest = encoder.config.min_samples
    sizes = session.get_inputs()[0].shape  # free ones have names
    shape = sizes if isinstance(sizes[1], int) else (2, shortest + SAMPLING_RATE)
    noise = 0.1 * torch.randn(*shape, generator=torch.Generator().manual_seed(0))
    mask = torch.ones(noise.shape, dtype=torch.int64)
    feeds = {"input_values": noise.numpy()}
    if accepts_mask:
        mask[1, shortest + SAMPLING_RATE // 3 :] = 0
        feeds["attention_mask"] = mask.numpy()
    answers = torch.from_numpy(session.run(["embeddings"], feeds)[0])
    expected = _Exported(encoder)(noise, mask)
    return float(((answers - expected).norm(dim=1) / expected.norm(dim=1)).max())


def fixed_samples(model: MRLReDimNetPreTrainedModel, seconds: float) -> int:
    """A fixed length in samples; raises ValueError for one that the model does not take."""
    least, most = model.config.min_samples / SAMPLING_RATE, model.config.window_seconds
    if not least <= seconds <= most:  # also where it is no number
        raise ValueError(f"seconds: got {seconds:g}, the model takes {least:.3g} to {most:g}.")
    return round(seconds * SAMPLING_RATE)


def export_browser(
    model: MRLReDimNetPreTrainedModel,
    folder: str | Path,
    *,
    mask: bool = True,
    facts: dict[str, str] | None = None,
    thresholds: Thresholds | None = None,
) -> dict[str, float]:
    """Writes a folder that transformers.js loads (https://huggingface.co/docs/transformers.js): `model`'s encoder in
    every precision, its configuration, a feature extractor that transformers.js has, and a page that says how.

    folder: is written whole or not at all, in place of what was there. mask, facts: as of `export_onnx`. thresholds:
    are written to thresholds.json, but for those of other weights than the facts name.

    Returns:
        How far each file's embeddings are from the model's, by its name: see `deviation`.

    Raises ValueError as `export_onnx` does.
    """
    facts, config = facts or {}, model.config
    found: dict[str, float] = {}
    settings = {key: value for key, value in config.to_dict().items() if key not in UNSAID}
    settings |= {"transformers.js_config": {"dtype": "fp32"}}  # in a browser it takes q8 by default
    extractor = {
        "feature_extractor_type": "Wav2Vec2FeatureExtractor",  # transformers.js has no other that passes samples on
        "do_normalize": False,
        "feature_size": 1,
        "min_samples": config.min_samples,
        "padding_side": "right",
        "padding_value": 0.0,
        "return_attention_mask": mask,
        "sampling_rate": SAMPLING_RATE,
    }
    weights = facts.get("weights") or fingerprint(model)
    entries = [] if thresholds is None else thresholds.entries
    kept = [entry for entry in entries if same_weights(entry.weights, weights)]

    def write(target: Path) -> None:
        (target / "onnx").mkdir()
        for precision, name in BROWSER_FILES.items():
            file = export_onnx(model, target / "onnx" / name, precision=precision, mask=mask, facts=facts)
            found[f"onnx/{name}"] = deviation(model, file)
        for name, content in (("config.json", settings), ("preprocessor_config.json", extractor)):
            (target / name).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        if kept:
            Thresholds(kept).save(target)
        source = facts.get("base") or "a model"
        source += f" with the adapter {facts['adapter']}" if facts.get("adapter") else ""
        (target / "README.md").write_text(BROWSER_PAGE.format(source=source), encoding="utf-8")

    replace_folder(Path(folder), write)
    return found


class _Weighted(nn.Module):
    """waveform [B, 1, T], weights [B, n] -> embeddings [B, D] float32: `frame_weights` of the model."""

    def __init__(self, encoder: MRLReDimNetModel) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, waveform: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        require = torch._check  # noqa: SLF001 -- what torch.export's manual says to bound sizes by
        require(waveform.shape[2] >= self.encoder.config.min_samples)
        require(weights.shape[0] == waveform.shape[0])
        return self.encoder.projection(self.encoder.pooled(waveform[:, 0], None, weights[:, None])).float()


def export_onnx_weights(
    model: MRLReDimNetPreTrainedModel, path: str | Path, *, facts: dict[str, str] | None = None
) -> Path:
    """Writes `model`'s encoder as an ONNX file that weighs the parts of its audio, for tools that know who talks when
    (such as diart, by its `EmbeddingModel.from_onnx`).

    Inputs: `waveform` [batch, 1, samples] float32 at 16 kHz, `weights` [batch, parts] float32, of any number of equal
    parts. Output: `embedding` [batch, D] float32, NaN where all weights are 0. In the metadata: `facts`.

    Raises ValueError without the `export` extra, or where the file's answers are further from the model's than
    `PRECISIONS` allows; no file is left then.
    """
    onnx = _require_onnx()
    with extra("export"):
        from onnxruntime import InferenceSession

    free, module = torch.export.Dim.DYNAMIC, _Weighted(graph_form(model))
    samples = 2 * model.config.min_samples + model.config.hop_length
    arguments = {"waveform": torch.zeros(2, 1, samples), "weights": torch.ones(2, 7)}
    shapes = {"waveform": {0: free, 2: free}, "weights": {0: free, 1: free}}
    graph = _graph_of(module, arguments, shapes, [*arguments], "embedding")
    for key, value in (facts or {}).items():
        graph.metadata_props.add(key=key, value=value)

    def write(file: Path) -> None:
        onnx.save(graph, file)
        noise = 0.1 * torch.randn(2, 1, SAMPLING_RATE, generator=torch.Generator().manual_seed(0))
        weights = torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, 1.0]])
        session = InferenceSession(file, providers=["CPUExecutionProvider"])
        answers = session.run(["embedding"], {"waveform": noise.numpy(), "weights": weights.numpy()})[0]
        with torch.inference_mode():
            expected = _encoder(model)(noise[:, 0], frame_weights=weights).embeddings
        found = float((torch.from_numpy(answers) - expected).norm() / expected.norm())
        if not found <= PRECISIONS["float32"]:
            raise ValueError(
                f"The embeddings of noise are {found:.2g} of their length from the model's: {path} is not written."
            )

    replace_file(Path(path), write)
    return Path(path)


def export_onnx_adapter(model: MRLReDimNetPreTrainedModel, path: str | Path, *, adapter: str | Path) -> Path:
    """Writes a LoRA adapter of `model` (folder or Hub id) as onnxruntime's LoraAdapter.Load reads it.

    It goes with the file that `export_onnx` writes for `model` with `adapter_inputs` that reach all its layers
    (onnxruntime names an input that is missing); the base's fingerprint is its model version (see
    `adapter_base_number`).

    Raises ValueError for an adapter of another base (WrongBaseError), one that is more than factors of linear layers,
    or without the `export` extra.
    """
    _require_onnx()
    with extra("export"):
        from onnxruntime import AdapterFormat, OrtValue

    encoder = model.base_model
    found = read_adapter(local_folder(adapter, None, None), encoder)
    if found.facts is not None:
        found.facts.check_base(encoder, model.config.name_or_path)
    if not found.plain or found.head is not None:
        raise ValueError(f"{adapter}: only plain LoRA can be swapped, no DoRA, norms or classifier: merge it instead.")
    factors = {}
    for key, tensor in found.tensors.items():
        layer, kind = key.removesuffix(".weight").rsplit(".", 1)
        if not isinstance(encoder.get_submodule(layer), nn.Linear):
            raise ValueError(f"{adapter}: adapts {layer}, which is no linear layer: merge it instead.")
        scale = scaling(found.config, layer, tensor.shape[1]) if kind == "lora_B" else 1.0
        factors[f"{layer}.{kind}"] = OrtValue.ortvalue_from_numpy((tensor.float() * scale).numpy())
    content = AdapterFormat()
    content.set_adapter_version(1)
    content.set_model_version(adapter_base_number(fingerprint(encoder)))
    content.set_parameters(factors)
    replace_file(Path(path), lambda file: content.export_adapter(str(file)))
    return Path(path)


def _require_onnx():
    with extra("export"):
        import onnx
        import onnxruntime  # noqa: F401
        import onnxscript  # noqa: F401
    return onnx


def _make_adaptable(encoder: MRLReDimNetModel, placement: str) -> dict[str, torch.Tensor]:
    """Makes places for LoRA factors at the layers of `placement`; the factors by name."""
    rule = re.compile(PLACEMENTS[placement])
    for name, part in list(encoder.named_modules()):
        if isinstance(part, nn.Linear) and rule.fullmatch(name):
            encoder.set_submodule(name, _AdaptableLinear(part))
    return {name: value.data for name, value in encoder.named_parameters() if name.endswith((".lora_A", ".lora_B"))}


def _halve(encoder: MRLReDimNetModel) -> None:
    """float16 weights; the front end computes in float32 whatever its dtype, but its constants are to stay exact."""
    for name, part in encoder.named_children():
        if name != "front_end":
            part.half()


def _traced(
    encoder: MRLReDimNetModel, mask: bool, factors: dict[str, torch.Tensor], samples: int | None
) -> "onnx.ModelProto":
    """The graph of `_Exported`; samples: see `_example`."""
    arguments, shapes = _example(encoder, mask, factors, samples)
    names = [*(name for name in arguments if name != "factors"), *factors]
    graph = _graph_of(_Exported(encoder), arguments, shapes, names, "embeddings")
    if samples is None:
        for value in [*graph.graph.input, *graph.graph.output]:
            _name_axes(value)
    for name, tensor in factors.items():
        neutral = tensor[:1] if name.endswith("lora_A") else tensor[:, :1]
        graph.graph.initializer.append(_require_onnx().numpy_helper.from_array(neutral.numpy(), name))
    return graph


def _graph_of(
    module: nn.Module, arguments: dict, shapes: dict | None, names: list[str], output: str
) -> "onnx.ModelProto":
    """A module's graph, as torch's exporter makes and simplifies it."""
    with extra("export"):
        from onnxscript.optimizer import optimize_ir

    with _quiet():
        program = torch.onnx.export(
            module,
            kwargs=arguments,
            dynamo=True,
            dynamic_shapes=shapes,
            input_names=names,
            output_names=[output],
            verbose=False,
        )
        # Once more, for large tensors: norms are to be in the kernels of the file, not folded at every start.
        optimize_ir(program.model, input_size_limit=FOLDED_BYTES, output_size_limit=FOLDED_BYTES)
    graph = program.model_proto
    for part in (*graph.graph.node, *graph.graph.value_info, *graph.graph.initializer):
        del part.metadata_props[:]  # where in the source it came from, with this machine's paths
    return graph


def _name_axes(value: "onnx.ValueInfoProto") -> None:
    """Free axes get names that people can read."""
    axes = value.type.tensor_type.shape.dim
    if value.name.endswith((".lora_A", ".lora_B")):
        axes[0 if value.name.endswith("A") else 1].dim_param = f"rank of {value.name.rsplit('.', 1)[0]}"
        return
    axes[0].dim_param = "batch"
    if value.name != "embeddings":
        axes[1].dim_param = "samples"


def _quantised(graph: "onnx.ModelProto") -> "onnx.ModelProto":
    """Linear layers in int8: weights rounded per output, inputs per tensor as they come."""
    with extra("export"):
        from onnxruntime.quantization import QuantType, quantize_dynamic

    front_end = [node.name for node in graph.graph.node if any("mel_filters" in name for name in node.input)]
    del graph.graph.value_info[:]  # shapes of weights that the quantiser turns round
    with tempfile.TemporaryDirectory() as folder, _quiet():
        target = Path(folder) / "int8.onnx"
        quantize_dynamic(
            graph,
            target,
            op_types_to_quantize=["MatMul"],
            nodes_to_exclude=front_end,
            # Unsigned weights: with signed ones, processors without VNNI (AVX2 alone) add pairs of products in 16 bits,
            # which overflow (onnxruntime, "Quantize ONNX models", on U8S8 and U8U8).
            weight_type=QuantType.QUInt8,
            per_channel=True,
        )
        return _require_onnx().load(target)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' remarks on packages and graphs that are none of the user's business."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


# ----------------------------------------------------------------------------------------------------------------------
# torch.export


def export_torch(
    model: MRLReDimNetPreTrainedModel,
    path: str | Path,
    *,
    mask: bool = True,
    seconds: float | None = None,
    facts: dict[str, str] | None = None,
) -> Path:
    """Writes `model`'s encoder as a torch.export program (.pt2), which torch.export.load reads without this package.

    Called as program.module()(input_values=..., attention_mask=...), shapes, `mask`, `seconds` and `facts` as of
    `export_onnx`; the facts are JSON in the extra file mrl_redimnet.json. A program takes two frames of a network's
    last stage at least, of a ReDimNet2 a few hundredths of a second more than the model: a shape of one is another
    graph to torch. One of a fixed length has its front end as a convolution, for converters that know no STFT.

    Raises ValueError for a length that the model does not take.
    """
    samples = None if seconds is None else fixed_samples(model, seconds)
    encoder = _encoder(model) if samples is None else graph_form(model)
    stride, config = encoder.config.time_strides()[-1], encoder.config
    least = config.min_samples + (stride * config.hop_length if stride > 1 else 0)
    fixed = {} if samples is None else {"samples": str(samples)}
    facts = {**(facts or {}), "min_samples": str(least), **fixed}
    arguments, shapes = _example(encoder, mask, {}, samples)
    with _quiet():
        program = torch.export.export(_Exported(encoder, least), (), arguments, dynamic_shapes=shapes)
        for graph in program.graph_module.modules():  # one in another, where gradients are switched off
            for node in graph.graph.nodes:
                node.meta.pop("stack_trace", None)  # with this machine's paths
        extra = {FACTS_FILE: json.dumps(facts)}
        replace_file(Path(path), lambda file: torch.export.save(program, file, extra_files=extra))
    return Path(path)
