"""Folders for transformers.js: what `mrl-redimnet export --to browser` writes, and what node and Chromium answer."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
import soundfile
import torch
from commands import refusal, run
from conftest import TINY, relative_error, stages, tiny_model

from configuration_mrl_redimnet import MRLReDimNetConfig
from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.adapters import fingerprint
from mrl_redimnet.export import export_browser
from mrl_redimnet.recordings import FIRST, SAME_SPEAKER
from mrl_redimnet.saving import save_model
from mrl_redimnet.scoring.calibration import Threshold, Thresholds

EXAMPLE = Path(__file__).parents[1] / "examples" / "browser"
SMALLEST = dict(TINY, stages=stages((1, 1, 1, None)), pooling="TAP", group_divisor=None)
# How far an embedding may be from PyTorch's, relative to its length.
DTYPES = {"fp32": 1e-3, "fp16": 0.02, "q8": 0.1}


@pytest.fixture(scope="module")
def model():
    return tiny_model(MRLReDimNetConfig(**SMALLEST))


@pytest.fixture(scope="module")
def saved(model, tmp_path_factory) -> Path:
    """The model, with thresholds of it and of an adapter."""
    folder = tmp_path_factory.mktemp("saved") / "small"
    save_model(model, folder)
    scores = np.linspace(-1, 1, 400)
    labels = (scores + np.sin(40 * scores) > 0).astype(int)
    entry = Threshold.fit(scores, labels, wanted=0.2, dim=8, weights=fingerprint(model), trials="all")
    found = Thresholds()
    for each in (entry, replace(entry, adapter="telephony", weights=f"{fingerprint(model)}+sha256:1")):
        found.put(each)
    found.save(folder)
    return folder


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("browser") / "model"
    assert run("export", saved, "--to", "browser", "--out", folder) == 0
    return folder


@pytest.mark.slow
def test_the_folder_is_as_transformers_js_reads_it(model, exported):
    files = {file.relative_to(exported).as_posix() for file in exported.rglob("*") if file.is_file()}
    graphs = {"onnx/model.onnx", "onnx/model_fp16.onnx", "onnx/model_quantized.onnx"}
    assert files == {"README.md", "config.json", "preprocessor_config.json", "thresholds.json", *graphs}
    config = json.loads((exported / "config.json").read_text())
    assert config["transformers.js_config"] == {"dtype": "fp32"} and config["model_type"] == "mrl_redimnet"
    assert config["matryoshka_dims"] == model.config.matryoshka_dims and "auto_map" not in config
    extractor = json.loads((exported / "preprocessor_config.json").read_text())
    assert extractor["feature_extractor_type"] == "Wav2Vec2FeatureExtractor" and extractor["do_normalize"] is False
    assert extractor["sampling_rate"] == 16_000 and extractor["min_samples"] == model.config.min_samples
    [entry] = Thresholds.load(exported).entries  # the adapter is not in these files
    assert entry.adapter is None
    for name in graphs:
        graph = onnx.load(exported / name).graph
        assert [each.name for each in graph.input] == ["input_values", "attention_mask"]
        assert [each.name for each in graph.output] == ["embeddings"]
    assert not any(b"/small" in (exported / name).read_bytes() for name in files)  # no folder of this machine


@pytest.mark.slow
def test_what_was_there_is_replaced_whole_or_stays(model, saved, exported, tmp_path, capsys):
    out = shutil.copytree(exported, tmp_path / "model")
    (out / "config.json").write_text("old")
    assert "give a new folder, or --overwrite" in refusal(capsys, "export", saved, "--to", "browser", "--out", out)
    broken = tiny_model(model.config)
    broken.trunk.stem.norm.weight.data *= 1e6
    with pytest.raises(ValueError, match="precision float16: .* is not written"):
        export_browser(broken, out)
    assert (out / "config.json").read_text() == "old" and [each.name for each in tmp_path.iterdir()] == ["model"]
    assert run("export", saved, "--to", "browser", "--out", out, "--overwrite") == 0
    assert json.loads((out / "config.json").read_text())["model_type"] == "mrl_redimnet"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--out", "file"], "is a file, or there is no folder"),
        (["--out", "nowhere/model"], "there is no folder nowhere"),
        (["--out", "mine", "--overwrite"], "holds something else than an export for the browser"),
        (["--out", "model", "--precision", "int8"], "are for --to onnx, not for --to browser"),
        (["--out", "model", "--seconds", "3"], "--seconds is for --to onnx and --to torch, not for --to browser"),
    ],
)
def test_the_command_refuses(saved, tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("precious")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter").write_text("precious")
    assert message in refusal(capsys, "export", saved, "--to", "browser", *options)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["file", "mine"]


# ---------------------------------------------------------------- node and Chromium


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_a_threshold_that_knows_durations_is_applied_as_python_does(tmp_path):
    known = dict(wanted=0.1, weights="", trials="")
    rng = np.random.default_rng(0)
    scores, labels, seconds = rng.normal(size=900), rng.integers(0, 2, 900), rng.uniform(0.5, 9, (900, 2))
    plain = Threshold.fit(scores + labels, labels, dim=8, **known)
    timed = Threshold.fit(scores + labels * np.log(1 + seconds.min(axis=1)), labels, dim=16, seconds=seconds, **known)
    others = replace(plain, dim=16, enrolments=3), replace(plain, scorer="as_norm")
    Thresholds([plain, timed, *others]).save(tmp_path)
    sides = [(1.5, 4.0), (7.0, 0.6), (0.1, 60.0)]
    code = (
        f"import {{ thresholdsOf }} from {json.dumps((EXAMPLE / 'thresholds.js').as_uri())};\n"
        "import { readFileSync } from 'node:fs';\n"
        f"const entries = JSON.parse(readFileSync({json.dumps(str(tmp_path / 'thresholds.json'))})).entries;\n"
        f"const sides = {json.dumps(sides)};\n"
        "const found = [...thresholdsOf(entries)].map(([dim, from]) => [dim, sides.map((each) => from(...each))]);\n"
        "console.log(JSON.stringify(found));"
    )
    (tmp_path / "try.mjs").write_text(code)
    printed = subprocess.run(["node", tmp_path / "try.mjs"], capture_output=True, text=True, check=True).stdout
    expected = timed.calibration.score_at([timed.threshold] * 3, sides)
    assert json.loads(printed) == [[8, [plain.threshold] * 3], [16, pytest.approx(expected)]]


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """The example with the packaged model in a folder to serve, and the recordings as WAV files."""
    if shutil.which("node") is None:
        pytest.skip("node is not installed")
    if not (EXAMPLE / "node_modules").is_dir():
        pytest.skip("the packages of examples/browser are not installed: `make browser`")
    folder = tmp_path_factory.mktemp("page")
    for file in EXAMPLE.iterdir():
        if file.suffix in (".js", ".html", ".json"):
            shutil.copy(file, folder)
    (folder / "node_modules").symlink_to(EXAMPLE / "node_modules")
    assert run("export", "nano", "--to", "browser", "--out", folder / "model") == 0
    for name, recording in (("a", FIRST), ("b", SAME_SPEAKER)):
        samples, rate = soundfile.read(recording, dtype="int16")
        soundfile.write(folder / f"{name}.wav", samples, rate, subtype="PCM_16")
    return folder


@pytest.fixture(scope="module")
def embeddings() -> list[torch.Tensor]:
    """What PyTorch computes from the two recordings."""
    encoder = SpeakerEncoder.from_pretrained("nano").model
    waves = (torch.from_numpy(soundfile.read(file, dtype="float32")[0]) for file in (FIRST, SAME_SPEAKER))
    with torch.inference_mode():
        return [encoder(input_values=wave[None]).embeddings[0] for wave in waves]


def javascript(page: Path, *arguments: object) -> str:
    """What a script of the example prints."""
    done = subprocess.run(["node", *map(str, arguments)], cwd=page, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


def check(found: dict, embeddings: list[torch.Tensor], where: str):
    for dtype, bound in DTYPES.items():
        pairs = zip(found[dtype]["embeddings"], embeddings, strict=True)
        differ = max(relative_error(torch.tensor(answer), wanted) for answer, wanted in pairs)
        print(f"{where}, {dtype}: {differ:.1e} from PyTorch's, {found[dtype]['milliseconds']:.0f} ms per s of audio")
        assert differ < bound


@pytest.mark.slow
def test_transformers_js_in_node_answers_as_pytorch(page, embeddings):
    check(json.loads(javascript(page, "measure.js", "node", "model", "a.wav", "b.wav")), embeddings, "node")


@pytest.mark.slow
def test_the_example_for_node_compares_two_files(page, embeddings):
    lines = javascript(page, "compare.js", "model", "a.wav", "b.wav").splitlines()
    a, b = embeddings
    for line, dim in zip(lines, (16, 32, 64, 128, 192, 256), strict=True):
        cosine = torch.cosine_similarity(a[:dim], b[:dim], dim=0).item()
        assert line.split()[:3] == [str(dim), "dimensions:", "cosine"]
        assert float(line.split()[3]) == pytest.approx(cosine, abs=2e-4)
    assert lines[-1].endswith("same") and lines[0].endswith("different")


@pytest.fixture
def address(page):
    """A server of the page, as the example starts it."""
    command = [sys.executable, "-u", "-m", "http.server", "--bind", "127.0.0.1", "--directory", str(page), "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as server:
        port = server.stdout.readline().split("port ")[1].split()[0]
        yield f"http://127.0.0.1:{port}"
        server.terminate()


@pytest.mark.slow
def test_the_page_in_chromium_answers_as_pytorch_and_asks_no_other_server(page, address, embeddings):
    chromium = os.environ.get("CHROMIUM", "/usr/bin/chromium")
    if not Path(chromium).exists():
        pytest.skip(f"there is no {chromium}: install chromium, or name it in CHROMIUM")
    found = json.loads(javascript(page, "measure.js", "chromium", address, "a.wav", "b.wav"))
    check(found, embeddings, f"Chromium {found['version']}")
    assert found["page"]["elsewhere"] == [] and found["page"]["errors"] == []
    a, b = embeddings
    thresholds = Thresholds.load(page / "model")
    seconds = [soundfile.info(page / name).duration for name in ("a.wav", "b.wav")]
    for dim, answer in found["page"]["answers"].items():
        cosine = torch.cosine_similarity(a[: int(dim)], b[: int(dim)], dim=0).item()
        assert answer["cosine"] == pytest.approx(cosine, abs=2e-4)
        (same,), _ = thresholds.find(int(dim)).judge([cosine], [seconds])
        assert answer["decision"] == ("Same speaker" if same else "Different speakers")
