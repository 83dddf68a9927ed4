"""How strangers reach a model or an adapter: the lines of the documents, each in a process and an environment with
nothing but what these lines need, and its numbers beside those of `SpeakerEncoder`.

Run by `make test-foreign` (tests/foreign/run.py); packages come from their registries. The lines are taken out of the
documents, and names of models and files alone are given or replaced. a.wav and b.wav are one woman, c.wav is another:
the recordings in the package.
"""

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from environments import FOLDER, ROOT, Environment, build_wheel, environment, printed
from local_hub import ANNA, LocalHub

from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.recordings import FIRST, OTHER_SPEAKER, SAME_SPEAKER
from mrl_redimnet.saving import load_model, packaged_adapters, save_model
from mrl_redimnet_cli import main

RECORDINGS = {"a.wav": FIRST, "b.wav": SAME_SPEAKER, "c.wav": OTHER_SPEAKER}
REPO, ADAPTER_REPO = "anna/nano", "anna/nano-children"  # on a Hub on this machine
# How far numbers may be from ours: embeddings relative to their length, scores as they are.
CLOSE, PRINTED = 1e-4, 1.5e-4  # other kernels for float32; numbers printed with four digits behind the point
BFLOAT16, FLOAT16 = 0.05, 0.02
CORE_ML = 5e-4  # coremltools takes the tanh form of GELU for the exact one
WORDS = re.compile(r"\w+")


# ---------------------------------------------------------------- the documents


def page(name: str) -> str:
    return (ROOT / name).read_text()


README, HUB, EXPORT, ADAPTERS = map(page, ("README.md", "docs/hub.md", "docs/export.md", "docs/adapters.md"))


def section(text: str, heading: str) -> str:
    """What stands below a heading, up to the next one."""
    return re.split(r"\n#+ ", text.split(f"# {heading}\n")[1])[0]


def blocks(text: str, language: str) -> list[str]:
    """The code blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def line_of(text: str, start: str) -> str:
    """The first line that begins so, without its remark."""
    found = next(line for line in text.splitlines() if line.startswith(start))
    return re.sub(r"\s+#.*", "", found)


def inline(text: str, start: str) -> str:
    """The first piece of code in a sentence that begins so."""
    return re.search(rf"`({re.escape(start)}[^`]*)`", text)[1]


# ---------------------------------------------------------------- what is compared


def distance(found, expected) -> float:
    """How far embeddings [..., D] are from ours relative to their lengths, the worst; of anything smaller, as it is."""
    found, expected = np.asarray(found, np.float64), np.asarray(expected, np.float64)
    assert found.shape == expected.shape
    differ = np.abs(found - expected)
    if expected.ndim and expected.shape[-1] >= 16:
        differ = np.linalg.norm(differ, axis=-1) / np.linalg.norm(expected, axis=-1)
    return float(differ.max())


def cosines(embeddings: np.ndarray) -> np.ndarray:
    units = embeddings / np.linalg.norm(embeddings, axis=-1, keepdims=True)
    return units @ units.T


# Appended to the lines: the values of NAMES go into found.json.
KEEP = """
import json as _json


def _plain(value):
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(each) for each in value]
    return value.tolist() if hasattr(value, "tolist") else value


with open("found.json", "w") as _file:
    _json.dump({name: _plain(globals()[name]) for name in NAMES}, _file)
"""


class Door:
    """One way in: runs lines, compares numbers, and keeps for the page what was installed and how far they are."""

    def __init__(self, folder: Path, record: Callable[[str, object], None], hub: str):
        self.folder, self.record, self.hub = folder, record, hub
        self.worst: dict[tuple[str, float], float] = {}
        self.printed = ""

    def environment(self, name: str, *packages: str, **options) -> Environment:
        """With these packages alone and what they need; for options see `environments.environment`."""
        made = environment(name, *packages, **options)
        assert ("mrl-redimnet" in made.installed) == (options.get("wheel") is not None)
        named = [re.split("[<>=]", each)[0] for each in packages] + ["mrl-redimnet"] * ("wheel" in options)
        versions = [f"{each} {made.installed[each]}" for each in named]
        self.record("installed", f"{', '.join(versions)}; {len(made.installed)} packages in all")
        return made

    def python(self, environment: Environment, code: str, keep: Sequence[str], **variables: str) -> dict:
        """The values of names after `code` has run; `printed` is what it printed."""
        (self.folder / "door.py").write_text(f"{code}\n{KEEP.replace('NAMES', repr([*keep]))}")
        self.printed = environment.run("python", "-I", "door.py", folder=self.folder, **variables)
        return json.loads((self.folder / "found.json").read_text())

    def with_hub(self, environment: Environment, code: str, keep: Sequence[str]) -> dict:
        """The same, where the Hub can be reached; REPO and ADAPTER_REPO are on it."""
        names = f"REPO, ADAPTER_REPO = {REPO!r}, {ADAPTER_REPO!r}\n"
        return self.python(environment, names + code, keep, HF_ENDPOINT=self.hub)

    def compare(self, found, expected, allowed: float = CLOSE, note: str = "") -> None:
        """Fails where they are further apart than `allowed`. note: what is special about it, for the page."""
        differ = distance(found, expected)
        self.worst[note, allowed] = max(differ, self.worst.get((note, allowed), 0.0))
        worst = [dict(note=note, allowed=allowed, worst=value) for (note, allowed), value in self.worst.items()]
        self.record("worst", json.dumps(worst))
        assert differ <= allowed, f"{note or 'numbers'}: {differ:.2g} from ours, at most {allowed:g} is allowed"

    def compare_decision(self, found: dict, expected) -> None:
        """An answer of the pipeline with a decision of `SpeakerEncoder.verify`."""
        self.compare([found["score"], found["threshold"]], [expected.score, expected.threshold])
        assert found["accepted"] is expected.accepted


# ---------------------------------------------------------------- what the doors lead to


def as_documented(line: str, **names: object) -> list[str]:
    """A command line as its words behind the program's name; `names` stand in the place of its own."""
    return [str(names.get(word, word)) for word in shlex.split(line)[1:]]


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """A Hub with the packaged model, tagged v1, and its adapter, pushed as README.md says."""
    folder, program = tmp_path_factory.mktemp("pushed"), str(Path(sys.executable).with_name("mrl-redimnet"))
    adapter = packaged_adapters()["nano-children"]
    names = {"me/speaker-base": REPO, "me/speaker-telephony": ADAPTER_REPO, "runs/telephony/best": adapter}
    with LocalHub({ANNA: "anna"}) as hub:
        for start, options in (("mrl-redimnet push nano", ("--tag", "v1")), ("mrl-redimnet adapters push", ())):
            words = as_documented(line_of(README, start), **names)
            printed([program, *words, *options], folder, HF_ENDPOINT=hub.url, HF_TOKEN=ANNA)
        yield hub


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    return build_wheel(tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def export(tmp_path_factory) -> Callable[[str], Path]:
    """Runs a line of docs/export.md on the packaged model; the folder with what it wrote."""

    def run(line: str) -> Path:
        folder = tmp_path_factory.mktemp("exported")
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            assert not main(as_documented(line, MODEL="nano", FOLDER="model"))
        return folder

    return run


@pytest.fixture(scope="module")
def encoder() -> SpeakerEncoder:
    return SpeakerEncoder.from_pretrained("nano", device="cpu")


@pytest.fixture(scope="module")
def ours(encoder) -> np.ndarray:
    """The embeddings [3, 256] of the recordings."""
    return encoder.embed([*RECORDINGS.values()])


@pytest.fixture(scope="module")
def adapted() -> SpeakerEncoder:
    """With the adapter that comes with the package."""
    return SpeakerEncoder.from_pretrained("nano", "nano-children", device="cpu")


@pytest.fixture
def door(tmp_path, request, record_property, hub) -> Door:
    """A folder with the recordings as WAV files, and as tensors for those who cannot read files."""
    waves = []
    for name, recording in RECORDINGS.items():
        samples, rate = soundfile.read(recording, dtype="int16")
        soundfile.write(tmp_path / name, samples, rate, subtype="PCM_16")
        waves.append(torch.from_numpy(samples.astype(np.float32) / 2**15))
    torch.save(waves, tmp_path / "waves.pt")
    record_property("door", request.function.__doc__.strip())
    return Door(tmp_path, record_property, hub.url)


# ---------------------------------------------------------------- transformers and PEFT

CALLS = "transformers: models and adapters"
# Words of lines that need accelerate or PEFT, which brings it.
ACCELERATED = {"device_map", "disk", "ADAPTER_REPO"}
# After each line the embeddings of the model that there is by then.
LINE_BY_LINE = """
import torch
from transformers import AutoFeatureExtractor, AutoModel

extractor = AutoFeatureExtractor.from_pretrained(REPO, trust_remote_code=True)
batch = extractor([wave.numpy() for wave in torch.load("waves.pt")], sampling_rate=16_000)
FOLDER, OUT, DISK = "saved", "out", "disk"
embeddings = []
for line in LINES:
    exec(line)
    device = "cpu" if model.device.type == "meta" else model.device  # some of its weights are on the disk
    with torch.inference_mode():
        found = model(**{name: value.to(device) for name, value in batch.items()}).embeddings
    embeddings.append(found.float().cpu())
"""


def compare_line_by_line(door: Door, made: Environment, lines: list[str], expected: list[np.ndarray], more: str = ""):
    found = door.with_hub(made, f"LINES = {lines!r}\n{more}{LINE_BY_LINE}", ["embeddings"])["embeddings"]
    for line, embeddings, wanted in zip(lines, found, expected, strict=True):
        half = "bfloat16" if "bfloat16" in line else ""
        door.compare(embeddings, wanted, BFLOAT16 if half else CLOSE, half)


def card(hub: LocalHub, repository: str, language: str) -> str:
    """The block of a language on a repository's page."""
    of_main = hub.repositories[repository]
    text = of_main.commits[of_main.branches["main"]].files["README.md"].content.decode()
    return blocks(text, language)[0]


def test_pipeline(door, encoder, ours):
    """`transformers.pipeline`: docs/hub.md, README.md"""
    made = door.environment("pipeline", "transformers", "torch", "soundfile")
    (lines,) = blocks(section(HUB, "transformers: pipeline"), "py")
    lines += f"import transformers\nof_the_readme = {line_of(README, 'transformers.pipeline(')}"
    found = door.with_hub(made, lines, ("embedding", "short", "answer", "answers", "of_the_readme"))
    a, b, c = RECORDINGS.values()
    door.compare(found["embedding"], ours[0])
    door.compare(found["short"], ours[0, :64])
    for answer in (found["answer"], found["of_the_readme"]):
        door.compare_decision(answer, encoder.verify([a], [b])[0])
    for answer, enrolled in zip(found["answers"], ([a, b], [a]), strict=True):
        door.compare_decision(answer, encoder.verify(enrolled, [c])[0])


def test_auto_model(door, hub, encoder, ours):
    """`AutoModel`: docs/hub.md, the model's card"""
    made = door.environment("auto_model", "transformers", "torch")
    saved = door.folder / "saved"
    save_model(load_model("nano"), saved / "model")
    for file in (saved / "model").glob("*.py"):
        file.rename(saved / file.name)
    lines = [line for line in lines_of(CALLS, 0) if not ACCELERATED & {*WORDS.findall(line)}]
    compare_line_by_line(door, made, lines, [ours] * len(lines))
    found = door.with_hub(made, card(hub, REPO, "python"), ("waveforms", "embeddings"))
    door.compare(found["embeddings"], encoder.embed([np.array(each, np.float32) for each in found["waveforms"]]))


def lines_of(heading: str, block: int) -> list[str]:
    return blocks(section(HUB, heading), "py")[block].splitlines()


def test_peft(door, hub, encoder, ours, adapted):
    """`AutoModel` and PEFT with an adapter: docs/hub.md, the adapter's card"""
    made = door.environment("peft", "peft", "transformers", "torch")
    of_adapter = adapted.embed([*RECORDINGS.values()])
    assert distance(of_adapter, ours) > 0.1
    auto = "from peft import AutoPeftModelForFeatureExtraction\n"
    lines = [line for line in lines_of(CALLS, 0) if ACCELERATED & {*WORDS.findall(line)} and "OUT" not in line]
    lines = ["model = AutoModel.from_pretrained(REPO, trust_remote_code=True)", *lines]
    expected = [of_adapter if "ADAPTER_REPO" in line else ours for line in lines]
    compare_line_by_line(door, made, lines, expected, auto)
    lines = [lines[0], *lines_of(CALLS, 1)]
    expected = [ours, *(ours if "disable" in line else of_adapter for line in lines[1:])]
    compare_line_by_line(door, made, lines, expected)
    found = door.with_hub(made, card(hub, ADAPTER_REPO, "python"), ("waveforms", "embeddings", "of_base"))
    waves = [np.array(each, np.float32) for each in found["waveforms"]]
    door.compare(found["embeddings"], adapted.embed(waves))
    door.compare(found["of_base"], encoder.embed(waves))


def test_trainer(door):
    """transformers' `Trainer`: examples/train_with_trainer.py"""
    made = door.environment("trainer", "transformers", "torch", "accelerate", "datasets", "soundfile")
    for name, speaker in (("a.wav", "one"), ("b.wav", "one"), ("c.wav", "other")):
        (door.folder / "speakers" / speaker).mkdir(parents=True, exist_ok=True)
        shutil.copy(door.folder / name, door.folder / "speakers" / speaker)
    example = ROOT / "examples" / "train_with_trainer.py"
    made.run("python", "-I", example, REPO, "speakers", folder=door.folder, HF_ENDPOINT=door.hub)
    trained = door.folder / "runs" / "trainer" / "last"
    lines = ["model = AutoModel.from_pretrained('runs/trainer/last', trust_remote_code=True)"]
    expected = SpeakerEncoder.from_pretrained(trained, device="cpu").embed([*RECORDINGS.values()])
    compare_line_by_line(door, made, lines, [expected])


# ---------------------------------------------------------------- sentence-transformers


def test_sentence_transformers(door, ours):
    """`SentenceTransformer`: docs/hub.md, README.md"""
    made = door.environment("sentence_transformers", "sentence-transformers", "torch", "soundfile")
    lines = blocks(section(HUB, "sentence-transformers"), "py")[0]
    lines += f"import sentence_transformers\nof_the_readme = {line_of(README, 'sentence_transformers.Sent')}"
    found = door.with_hub(made, lines, ("embeddings", "cosines", "bits", "of_the_readme"))
    short = ours[:2, :64]
    for each in (found["embeddings"], found["of_the_readme"]):
        door.compare(each, short)
    door.compare(found["cosines"], cosines(short))
    bits = np.packbits(np.array(found["embeddings"]) > 0, axis=-1).astype(int) - 128  # their convention
    np.testing.assert_array_equal(found["bits"], bits)


def test_sentence_transformers_evaluates(door, ours, wheel):
    """Its evaluators with this repository's modules of `evaluate`: docs/hub.md"""
    made = door.environment("evaluators", "sentence-transformers", wheel=wheel, extras="[evaluation]")
    first, second = blocks(section(HUB, "sentence-transformers"), "py")
    second = second.replace('"metrics/eer"', repr(str(ROOT / "metrics" / "eer")))
    found = door.with_hub(made, first + second, ("scores", "rates", "found"))
    door.compare(found["scores"], cosines(ours[:, :64])[0, 1:])
    assert found["rates"]["eer"] == 0.0 and found["found"]["cosine_accuracy"] == 1.0


# ---------------------------------------------------------------- this package, as a wheel without extras


def test_data_sets(door, ours, wheel):
    """`dataset.map(encoder.embed_batch)`, the wheel without extras: docs/hub.md"""
    made = door.environment("wheel", wheel=wheel)
    text = section(HUB, "datasets")
    (lines,), (output,) = blocks(text, "python"), blocks(text, "text")
    door.python(made, lines, ())
    assert door.printed == output
    undecoded = inline(text, "data.cast_column(")
    lines = lines[: lines.index("data =")] + (
        "import datasets\n"
        f"data = Dataset.from_dict({{'audio': {[*RECORDINGS]}}}).cast_column('audio', datasets.Audio())\n"
        f"column = {inline(text, 'encoder.embed(data)')}\n"
        f"data = {undecoded}\n"
        "mapped = data.map(encoder.embed_batch, batched=True)['embedding'][:]\n"
    )
    found = door.python(made, lines, ("column", "mapped"))
    door.compare(found["column"], ours)
    door.compare(found["mapped"], ours)


def test_command_line(door, encoder, adapted, wheel):
    """`mrl-redimnet verify`, the wheel alone, offline: README.md, docs/adapters.md"""
    made = door.environment("wheel", wheel=wheel)
    door.python(made, blocks(README, "python")[0], ())
    assert door.printed == blocks(README, "text")[0]
    line, with_adapter = inline(README, "mrl-redimnet verify nano"), line_of(ADAPTERS, "mrl-redimnet verify nano")
    a, b, c = RECORDINGS.values()
    both = {"enrol1.wav": "a.wav", "enrol2.wav": "b.wav", "unknown.wav": "c.wav"}
    one = {"enrol1.wav": "a.wav", "enrol.wav": "a.wav", "unknown.wav": "b.wav"}
    for shown, names, expected in (
        (line, both, encoder.verify([a, b], [c], 64)),
        (line.replace(" enrol2.wav", ""), one, encoder.verify([a], [b], 64)),
        (with_adapter, one, adapted.verify([a], [b], threshold=float(with_adapter.split()[-1]))),
    ):
        (expected,) = expected
        words = as_documented(shown, **names)
        said = made.run("mrl-redimnet", *words, folder=door.folder, fails=not expected.accepted)
        outcome, score = re.search(r"^(\w+) +score ([-\d.]+)", said, re.MULTILINE).groups()
        assert outcome == ("accepted" if expected.accepted else "rejected")
        door.compare(float(score), expected.score, PRINTED, "four digits")


# ---------------------------------------------------------------- exported files


def compare_printed(door: Door, printed: str, encoder: SpeakerEncoder, ours: np.ndarray):
    """The lines that the examples print on a.wav and b.wav, one for each dimension."""
    found = re.findall(r"(\d+) dimensions: cosine ([-\d.]+)  (\w+)", printed)
    assert [int(dim) for dim, *_ in found] == encoder.config.matryoshka_dims
    for dim, cosine, decision in found:
        door.compare(float(cosine), cosines(ours[:2, : int(dim)])[0, 1], PRINTED, "four digits")
        (expected,) = encoder.verify([FIRST], [SAME_SPEAKER], int(dim))
        assert decision == ("same" if expected.accepted else "different")


def test_onnxruntime(door, export, encoder, ours):
    """An ONNX file in ONNX Runtime: docs/export.md, examples/embed_with_onnxruntime.py"""
    made = door.environment("onnxruntime", "onnxruntime", "numpy", "soundfile")
    file = export(line_of(EXPORT, "mrl-redimnet export MODEL --to onnx --out model.onnx")) / "model.onnx"
    program, *words = as_documented(line_of(EXPORT, "python examples/embed_with_onnxruntime.py"))
    shutil.copy(file, door.folder)
    compare_printed(door, made.run("python", "-I", ROOT / program, *words, folder=door.folder), encoder, ours)


PADDED = """
import torch

waves = torch.load("waves.pt")
WAVEFORMS = torch.nn.utils.rnn.pad_sequence(waves, batch_first=True)
MASK = (torch.arange(WAVEFORMS.shape[1]) < torch.tensor([[len(wave)] for wave in waves])).long()
"""


def test_torch_alone(door, export, ours):
    """A program of torch.export with torch alone: docs/export.md"""
    made = door.environment("torch", "torch")
    line = line_of(EXPORT, "mrl-redimnet export MODEL --to torch --out model.pt2")
    shutil.copy(export(line) / "model.pt2", door.folder)
    lines = next(block for block in blocks(EXPORT, "py") if "WAVEFORMS" in block)
    door.compare(door.python(made, PADDED + lines, ["embeddings"])["embeddings"], ours)


EVALUATED = f"""
import sys

sys.path.insert(0, {str(Path(__file__).parent)!r})
from core_ml import evaluated

waves = torch.load("waves.pt")
embeddings = [evaluated("model.mlpackage", input_values=wave[None, :48_000])[0].float() for wave in waves]
"""


@pytest.mark.parametrize("precision, allowed", [("FLOAT32", CORE_ML), ("FLOAT16", FLOAT16)])
def test_core_ml(door, export, encoder, precision, allowed):
    """A Core ML program by coremltools, computed operator by operator: docs/export.md"""
    made = door.environment("core_ml", "coremltools", "torch")
    text = section(EXPORT, "Core ML")
    shutil.copy(export(line_of(text, "mrl-redimnet export MODEL --to torch")) / "model_3s.pt2", door.folder)
    (lines,) = blocks(text, "py")
    lines = lines.replace("precision.FLOAT32", f"precision.{precision}")
    found = door.python(made, lines + EVALUATED, ["embeddings"])["embeddings"]
    waves = [soundfile.read(file, dtype="float32")[0][:48_000] for file in RECORDINGS.values()]
    door.compare(found, encoder.embed(waves), allowed, precision)


EXPORTER = """
import torch
from transformers import AutoModel

OUT = "out"
LINES
import numpy, onnxruntime

session = onnxruntime.InferenceSession("out/model.onnx", providers=["CPUExecutionProvider"])
embeddings = []
for wave in torch.load("waves.pt"):
    feeds = {"input_values": wave[None].numpy(), "attention_mask": numpy.ones((1, len(wave)), numpy.int64)}
    embeddings.append(session.run(None, feeds)[0][0])
"""


def test_transformers_exporter(door, ours):
    """transformers' `OnnxExporter`: docs/export.md"""
    made = door.environment("exporter", "transformers", "torch", "onnx", "onnxscript", "onnxruntime")
    (lines,) = blocks(section(EXPORT, "transformers' exporter"), "py")
    door.compare(door.with_hub(made, EXPORTER.replace("LINES", lines), ["embeddings"])["embeddings"], ours)


DIART = """
import numpy
import torch
from diart import SpeakerDiarization, SpeakerDiarizationConfig
from diart.blocks import OverlapAwareSpeakerEmbedding
from diart.models import EmbeddingModel, SegmentationModel
from pyannote.core import SlidingWindow, SlidingWindowFeature

embedding = LINE
a, b, c = (wave[:48_000] for wave in torch.load("waves.pt"))
waveforms, weights = torch.stack([a, b, c])[:, None], torch.rand(3, FRAMES, generator=torch.Generator().manual_seed(0))
embeddings = embedding(waveforms, weights)

# A conversation of four turns, chunk by chunk. Who speaks in a chunk is given, as a segmentation would say it: whoever
# is heard first is its first speaker, and a third one is not heard.
conversation, turns, step, duration = torch.cat([a, c, b, c]), [0, 1, 0, 1], 0.5, 5.0


class Known:
    def __init__(self):
        self.chunks = 0

    def __call__(self, waveform):
        times = self.chunks * step + (torch.arange(FRAMES) + 0.5) * duration / FRAMES
        speakers = [turns[int(time // 3)] for time in times]
        order = list(dict.fromkeys(speakers))
        self.chunks += 1
        found = torch.zeros(1, FRAMES, 3)
        found[0, range(FRAMES), [order.index(each) for each in speakers]] = 1.0
        return found

    def to(self, device):
        return self


chunk, heard = conversation[:80_000, None], Known()(None)[0]
block = OverlapAwareSpeakerEmbedding(embedding)
penalised, of_chunk = block.osp(heard), block(chunk, heard)
config = SpeakerDiarizationConfig(
    segmentation=SegmentationModel(Known), embedding=embedding, step=step, duration=duration, delta_new=0.5
)
pipeline, labels = SpeakerDiarization(config), {}
for start in numpy.arange(0, len(conversation) / 16_000 - duration + step, step):
    first = int(start * 16_000)
    window = SlidingWindow(start=start, duration=1 / 16_000, step=1 / 16_000)
    samples = conversation[first : first + 80_000, None].numpy()
    ((annotation, _),) = pipeline([SlidingWindowFeature(samples, window)])
    for segment, _, label in annotation.itertracks(yield_label=True):
        labels.setdefault(label, []).append([segment.start, segment.end])
"""


def test_diart(door, export, encoder):
    """diart's `EmbeddingModel.from_onnx` and its pipeline, with weighted parts: docs/export.md"""
    # diart 0.9.2 wants numpy 1. The newest pyannote.audio and pyannote.core for that want what torchaudio 2.9 and
    # matplotlib 3.9 left out.
    packages = ("diart", "pyannote-audio", "onnxruntime", "torch", "torchaudio<2.9", "matplotlib<3.9")
    made = door.environment("diart", *packages, locked=False)
    line = line_of(EXPORT, "mrl-redimnet export MODEL --to onnx-weights")
    shutil.copy(export(line) / "weighted.onnx", door.folder)
    code = DIART.replace("LINE", inline(EXPORT, "EmbeddingModel.from_onnx(")).replace("FRAMES", "293")
    found = door.python(made, code, ("waveforms", "weights", "embeddings", "chunk", "penalised", "of_chunk", "labels"))
    found = {name: value if name == "labels" else torch.tensor(value) for name, value in found.items()}
    with torch.inference_mode():
        expected = encoder.model(found["waveforms"][:, 0], frame_weights=found["weights"]).embeddings
        of_chunk = encoder.model(found["chunk"].T, frame_weights=found["penalised"].transpose(1, 2)).embeddings
    door.compare(found["embeddings"], expected)
    door.compare(found["of_chunk"], of_chunk / of_chunk.norm(dim=-1, keepdim=True))
    middles = (1.5, 4.5, 7.5, 10.5)  # of the turns: one woman and the other in turn
    labels = found["labels"].items()
    heard = [{name for name, turns in labels if any(start <= at < end for start, end in turns)} for at in middles]
    assert len(labels) == 2 and heard[0] == heard[2] != heard[1] == heard[3] and all(len(each) == 1 for each in heard)


# ---------------------------------------------------------------- node

SNIPPET = """
import { AutoFeatureExtractor, AutoModel, env } from "@huggingface/transformers";
import { readWav } from "./wav.js";

env.allowRemoteModels = false;
const FOLDER_OR_HUB_ID = "./model";
const found = [];
for (const file of process.argv.slice(2)) {
  const { samples } = readWav(file);
LINES
  found.push([...embeddings.data]);
}
console.log(JSON.stringify(found));
"""


def node_packages() -> Path:
    """A folder with the example and its packages, by npm; kept."""
    example, folder = ROOT / "examples" / "browser", FOLDER / "node"
    lock, installed = example / "package-lock.json", folder / "installed.json"
    if not installed.exists() or installed.read_text() != lock.read_text():
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for file in (lock, example / "package.json"):
            shutil.copy(file, folder)
        # No install scripts, as in `make browser`: onnxruntime-node's would fetch CUDA libraries.
        command = ["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        shutil.copy(lock, installed)
    for file in example.glob("*.js"):
        shutil.copy(file, folder)
    return folder


def test_node(door, export, encoder, ours):
    """node, with and without transformers.js: docs/export.md, examples/browser/compare.js"""
    folder = node_packages()
    named = json.loads((folder / "package.json").read_text())["dependencies"]
    node = printed(["node", "--version"], door.folder).strip().removeprefix("v")
    door.record("installed", ", ".join(f"{name} {each}" for name, each in {"node": node, **named}.items()))
    text = section(EXPORT, "In the browser")
    model = export(line_of(text, "mrl-redimnet export MODEL --to browser")) / "model"
    shutil.copytree(model, door.folder / "model")
    files = ("model", "a.wav", "b.wav")
    compare_printed(door, printed(["node", str(folder / "compare.js"), *files], door.folder), encoder, ours)
    (lines,) = blocks(text, "js")
    (folder / "snippet.js").write_text(SNIPPET.replace("LINES", lines))
    found = printed(["node", str(folder / "snippet.js"), *RECORDINGS], door.folder)
    door.compare(json.loads(found.splitlines()[-1]), ours)
