"""The recipes of this repository start: the command in a recipe's comment, on a tiny corpus that lies as its does."""

import json
import re
import shlex
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
import torch
import yaml
from conftest import tiny_config, tiny_model
from safetensors.torch import save_file
from training_runs import train_here

from modeling_mrl_redimnet import MRLReDimNetForXVector
from mrl_redimnet.audio.io import SAMPLING_RATE
from mrl_redimnet.data.corpus import SpeakerTable
from mrl_redimnet.saving import save_model
from mrl_redimnet_cli import main as cli_main

FOLDER = Path(__file__).parent.parent
RECIPES = [path for part in ("recipes", "adapters") for path in sorted((FOLDER / part).glob("*.yaml"))]
TINY = dict(num_mel_bins=24, base_channels=4, group_divisor=4, embedding_size=32, matryoshka_dims=[8, 16, 32])
TINY |= dict(pooling_bottleneck=16, stages=[dict(frequency_stride=2, blocks=1, expansion=1, reduction=8)])


def commands(path: Path) -> list[list[str]]:
    """The words of every command in a recipe's comment: lines that are indented, and those they go on in."""
    text = re.sub(r"\\\n#\s*", "", path.read_text())
    text = re.sub(r",\n#\s+(?=\w+:)", ", ", text)  # within quotes
    lines = re.findall(r"^#   ((?:accelerate|mrl-redimnet) .*)$", text, re.MULTILINE)
    return [shlex.split(line, comments=True) for line in lines]


def training_command(path: Path) -> list[str]:
    (command,) = [words for words in commands(path) if words[0] == "accelerate"]
    assert command[:3] == ["accelerate", "launch", "train_hf.py"]
    assert FOLDER / command[3] == path
    return command[4:]


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """All that the commands name, as it unpacks: corpora of a few speakers, lists, noise, rooms, models."""
    folder, rng = tmp_path_factory.mktemp("world"), np.random.default_rng(0)

    def sound(name: str, seconds: float = 0.7):
        """A hum of a pitch of its own for every speaker."""
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        pitch = 80 + 40 * (sum(map(ord, re.findall(r"id\d+|$", name)[0])) % 7)
        time = np.arange(round(seconds * SAMPLING_RATE)) / SAMPLING_RATE
        wave = 0.2 * np.sin(2 * np.pi * pitch * time) + 0.05 * rng.standard_normal(len(time))
        soundfile.write(folder / name, wave, SAMPLING_RATE)

    many = [f"id{number:05d}" for number in range(12, 20)]
    for name in many:
        for video in ("21Uxsk56VDQ", "2DLq_Kkc1r8"):
            sound(f"VOX2/dev/aac/{name}/{video}/00001.wav")
    for name in ("id10270", "id10271", "id10272"):
        for video in ("5r0dWxy17C8", "8jEAjG6SegY"):
            sound(f"VOX1/test/wav/{name}/{video}/00001.wav")
    pairs = [("id10270", "id10270", 1), ("id10271", "id10271", 1), ("id10270", "id10271", 0), ("id10272", "id10271", 0)]
    trials = [f"{same} {a}/5r0dWxy17C8/00001.wav {b}/8jEAjG6SegY/00001.wav" for a, b, same in pairs]
    for name in ("veri_test2.txt", "FILE"):
        (folder / name).write_text("\n".join(trials) + "\n")

    # CN-Celeb: a thousand speakers in data, here eleven; the recordings of the evaluation part say .wav in the lists.
    listed = [f"id{number:05d}" for number in range(10, 18)]  # some are other people in VoxCeleb2
    for name in (*listed, "id00800", "id00801", "id00802"):
        for file in ("singing-01-001", "speech-02-001"):
            sound(f"CN-Celeb_flac/data/{name}/{file}.flac")
            if name in listed or name == "id00800":  # links would do as well
                sound(f"CNCELEB/{name}/{file}.flac")
    (folder / "CN-Celeb_flac/dev").mkdir()
    (folder / "CN-Celeb_flac/dev/dev.lst").write_text("\n".join(listed) + "\n")
    (folder / "CN-Celeb_flac/eval/lists").mkdir(parents=True)
    trials, models = [], []
    for name in ("id00800", "id00801", "id00802"):
        sound(f"CN-Celeb_flac/eval/test/{name}-vlog-01-001.flac")
        models.append(f"{name}-enroll {name}/singing-01-001.wav {name}/speech-02-001.wav")
        trials += [
            f"{name}-enroll test/{other}-vlog-01-001.wav {int(name == other)}" for other in ("id00800", "id00801")
        ]
    (folder / "CN-Celeb_flac/eval/lists/trials.lst").write_text("\n".join(trials) + "\n")
    (folder / "CN-Celeb_flac/eval/lists/enroll.map").write_text("\n".join(models) + "\n")

    for kind in ("noise", "music", "speech"):
        for i in range(2):
            sound(f"MUSAN/{kind}/set/{kind}-set-000{i}.wav")
    sound("NOISE_DIR/hiss.wav")
    sound("RIRS_NOISES/simulated_rirs/smallroom/Room001/Room001-00001.wav", 0.1)
    (folder / "DIR").symlink_to("VOX2/dev/aac")
    (folder / "TEST_DIR").symlink_to("VOX1/test/wav")
    everyone = [*many, "id10270", "id10271", "id10272"]
    (folder / "gender.csv").write_text(
        "speaker,gender\n" + "".join(f"{name},{'fm'[i % 2]}\n" for i, name in enumerate(everyone))
    )
    files = [*folder.glob("VOX2/dev/aac/*/*/*.wav"), *folder.glob("VOX1/test/wav/*/*/*.wav")]
    (folder / "age.csv").write_text(
        "path,age\n" + "".join(f"{'/'.join(file.parts[-3:])},{20 + i % 9}\n" for i, file in enumerate(sorted(files)))
    )

    (folder / "packaged").mkdir()
    (folder / "packaged/speech").symlink_to(folder / "VOX2/dev/aac")
    (folder / "packaged/real").symlink_to(folder / "VOX2/dev/aac")
    (folder / "packaged/dev").symlink_to(folder / "VOX1/test/wav")
    (folder / "packaged/dev_trials.txt").write_text((folder / "FILE").read_text())
    ids = ["/".join(file.parts[-3:]) for file in sorted(folder.glob("VOX2/dev/aac/*/*/*.wav"))]
    table = pa.table({"id": ids, "embedding": list(rng.standard_normal((len(ids), 12)))})
    pq.write_table(table, folder / "packaged/teacher.parquet")
    save_model(tiny_model(), folder / "runs/packaged_nano/best")
    save_file({"axes": torch.eye(12)}, folder / "runs/packaged_nano/teacher_axes.safetensors")

    torch.manual_seed(0)
    for name, speakers in (("BASE", many[:4]), ("runs/b2/best", many[:4]), ("my-b2", None)):
        model = tiny_model(tiny_config(num_speakers=4), kind=MRLReDimNetForXVector)
        save_model(model, folder / name, speakers and SpeakerTable(speakers))
    return folder


def shrunk(path: Path) -> list[str]:
    """Settings that make a run of a recipe one of seconds; the corpus's, the lists' and the layout's are its own."""
    groups = yaml.safe_load(path.read_text())
    recipe = {name: value for group in groups.values() for name, value in group.items()}
    small = dict(epochs=None, steps=2, batch_size=4, crop_seconds=0.4, workers=0, bootstrap_samples=10, tracker="none")
    small |= dict(dev_speakers=3)
    if recipe.get("finetune", "all") == "all":
        small |= dict(evaluate_every=1, weight_averaging=recipe.get("weight_averaging") and 0.99)
        small |= dict(rotate_at=[]) if recipe.get("rotate_at") != [] else {}  # so few utterances have no one basis
    if "size" in recipe:
        small["model_options"] = {**recipe.get("model_options", {}), **TINY}
        small |= {"prefix_starts": [0.1, 0.1, 0]} if "prefix_starts" in recipe else {}
    small |= dict(report_dims=[4]) if "report_dims" in recipe else {}
    if recipe.get("domain") == "noisy":
        small |= dict(domain_options={**recipe["domain_options"], "room_count": 1})
    return [f"--{name}={json.dumps(value)}" for name, value in small.items() if value is not None or name == "epochs"]


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: f"{path.parent.name}-{path.stem}")
def test_a_recipe_is_started_by_the_command_of_its_comment(path, world, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(world)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", world / "cache")
    argv = [word.replace("FILE.csv", f"{path.stem}.csv") for word in training_command(path)]
    train_here([str(path), *argv, *shrunk(path), f"--output={tmp_path / 'run'}"])
    results = json.loads((tmp_path / "run/results.json").read_text())
    wanted = yaml.safe_load(argv[argv.index("--tests") + 1])
    assert list(results["results"]) == list(wanted)
    assert (tmp_path / "run/best/README.md").is_file()
    printed = capsys.readouterr().out
    if "cnceleb" in path.stem:
        left_out = {"recipes": 1, "adapters": 3}[path.parent.name]
        assert f"{left_out} of {8 + left_out} speakers ({2 * left_out} utterances) are those of CN-Celeb's" in printed
        assert "taken over" not in printed
        names = json.loads((tmp_path / "run/speakers.json").read_text())
        assert names and not any(name.startswith("id008") for name in names)


def test_the_other_commands_of_the_comments_are_commands(world, monkeypatch, capsys):
    """They are understood; what is refused is that the corpus is not whole, and the speech not there."""
    monkeypatch.chdir(world)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", world / "cache")
    others = [words for path in RECIPES for words in commands(path) if words[0] != "accelerate"]
    refused = {
        "prepare": "16 usable utterances",
        "convert": "no folder VOX2/SOME_SPEECH",
    }
    assert {words[1] for words in others} == set(refused)
    for words in others:
        assert cli_main(words[1:]) == 2
        assert refused[words[1]] in capsys.readouterr().err
