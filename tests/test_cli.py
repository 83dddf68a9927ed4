"""The `mrl-redimnet` command, from a published file to a table of error rates."""

import json
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import relative_error, tiny_config, tiny_model, waves
from reference_weights import flattened, reference_tensor, reference_waveform
from transformers import AutoFeatureExtractor, AutoModel

from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification, MRLReDimNetForXVector
from mrl_redimnet.cli import main
from mrl_redimnet.corpus import SpeakerTable
from mrl_redimnet.saving import load_model, save_model

RECORDINGS = json.loads((Path(__file__).parent / "data" / "reference_answers.json").read_text())["recordings"]
WAVE = reference_waveform(16_000)


def published(name: str) -> dict:
    """A checkpoint as a published file holds it."""
    shapes = flattened(RECORDINGS[name]["state_dict"])
    tensors = {key: reference_tensor(key, shape) for key, shape in shapes.items()}
    return {"model_config": RECORDINGS[name]["model_config"], "state_dict": tensors}


def run(*argv) -> int:
    return main([str(argument) for argument in argv])


def refusal(capsys, *argv) -> str:
    """The one message of a command that fails."""
    assert run(*argv) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.startswith(f"mrl-redimnet {argv[0]}: ") and printed.err.endswith("\n")
    return printed.err


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("cli") / "corpus"
    assert run("synthesise", folder, "--train-speakers", 1, "--test-speakers", 2, "--seed", 4) == 0
    return folder


@pytest.fixture(scope="module")
def speech(tmp_path_factory) -> Path:
    """Six short files, at different depths."""
    folder = tmp_path_factory.mktemp("speech")
    for i, wave in enumerate(waves(*[6000] * 6)):
        (folder / f"{i % 2}" / "deeper").mkdir(parents=True, exist_ok=True)
        path = folder / f"{i % 2}" / f"{i}.wav" if i < 3 else folder / f"{i % 2}" / "deeper" / f"{i}.flac"
        soundfile.write(path, 0.1 * wave.numpy(), 16_000)
    return folder


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    torch.save(published("single_stage"), tmp_path / "published.pt")
    return tmp_path / "published.pt"


@pytest.fixture
def folder(tmp_path) -> Path:
    save_model(tiny_model(kind=MRLReDimNetForXVector), tmp_path / "model")
    return tmp_path / "model"


def embed(model, **options) -> torch.Tensor:
    with torch.inference_mode():
        return model.eval()(WAVE, **options).embeddings


def cosine(embeddings: torch.Tensor) -> float:
    return torch.cosine_similarity(*embeddings, dim=0).item()


# ---------------------------------------------------------------- synthesise


def test_synthesise_makes_a_corpus(corpus):
    assert (corpus / "test" / "trials.txt").is_file()
    assert {path.name for path in (corpus / "train" / "wav").iterdir()} == {"id00001"}
    assert json.loads((corpus / "corpus.json").read_text())["seed"] == 4


def test_synthesise_refuses_a_folder_of_something_else(tmp_path, capsys):
    (tmp_path / "thesis.txt").write_text("")
    assert "not a synthetic corpus" in refusal(capsys, "synthesise", tmp_path)


# ---------------------------------------------------------------- convert


def test_convert_makes_a_folder_that_answers_as_the_reference(checkpoint, tmp_path, capsys):
    assert run("convert", checkpoint, tmp_path / "out") == 0
    assert "embeddings of 32 dimensions" in capsys.readouterr().out
    model = AutoModel.from_pretrained(tmp_path / "out")
    recorded = torch.tensor(RECORDINGS["single_stage"]["answers"]["16000"]["embedding"])
    assert relative_error(embed(model), recorded) < 1e-5
    assert AutoFeatureExtractor.from_pretrained(tmp_path / "out").min_samples == model.config.min_samples


def test_convert_can_grow_the_embedding(checkpoint, tmp_path):
    assert run("convert", checkpoint, tmp_path / "out", "--embedding-size", 96) == 0
    model = load_model(tmp_path / "out")
    assert model.config.matryoshka_dims == [64, 96]
    recorded = torch.tensor(RECORDINGS["single_stage"]["answers"]["16000"]["embedding"])
    assert cosine(embed(model)) == pytest.approx(cosine(recorded), abs=1e-5)


def test_convert_can_rotate(checkpoint, speech, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("convert", checkpoint, out, "--embedding-size", 96, "--rotate-on", speech) == 0
    printed = capsys.readouterr().out
    assert "Note: 6 utterances for 96 dimensions" in printed
    assert "Rotated on 6 utterances; energy of the embeddings in each prefix: 64: 100.0 %, 96: 100.0 %" in printed
    model = load_model(out)
    recorded = torch.tensor(RECORDINGS["single_stage"]["answers"]["16000"]["embedding"])
    assert cosine(embed(model)) == pytest.approx(cosine(recorded), abs=1e-5)
    assert embed(model, truncate_dim=64).shape == (2, 64)


def test_a_broken_checkpoint_leaves_no_folder(tmp_path, capsys):
    checkpoint = published("single_stage")
    del checkpoint["state_dict"]["pool.linear1.weight"]
    torch.save(checkpoint, tmp_path / "broken.pt")
    assert "missing: pool.linear1.weight" in refusal(capsys, "convert", tmp_path / "broken.pt", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["broken.pt"]


def test_a_missing_checkpoint_is_named(tmp_path, capsys):
    assert "nothing.pt" in refusal(capsys, "convert", tmp_path / "nothing.pt", tmp_path / "out")


def test_convert_refuses_a_smaller_embedding(checkpoint, tmp_path, capsys):
    message = refusal(capsys, "convert", checkpoint, tmp_path / "out", "--embedding-size", 16)
    assert "16 is less than the checkpoint's 32" in message and not (tmp_path / "out").exists()


# ---------------------------------------------------------------- rotate


def test_rotate_keeps_the_whole_and_the_head(folder, speech, tmp_path, capsys):
    assert run("rotate", folder, speech, tmp_path / "rotated") == 0
    assert "Rotated on 6 utterances" in capsys.readouterr().out
    before, after = load_model(folder), load_model(tmp_path / "rotated")
    assert type(after) is MRLReDimNetForXVector
    assert cosine(embed(before)) == pytest.approx(cosine(embed(after)), abs=1e-5)
    with torch.inference_mode():
        assert torch.allclose(before(WAVE).logits, after(WAVE).logits, atol=3e-4)
    assert not torch.allclose(embed(before), embed(after), atol=0.01)


def test_rotate_keeps_the_names_of_the_classifiers_speakers(speech, tmp_path):
    names = SpeakerTable([f"id{i}" for i in range(5)])
    save_model(tiny_model(kind=MRLReDimNetForXVector), tmp_path / "model", names)
    assert run("rotate", tmp_path / "model", speech, tmp_path / "out") == 0
    assert SpeakerTable.load(tmp_path / "out" / "speakers.json").names == names.names


def test_any_head_can_be_rotated(speech, tmp_path):
    model = tiny_model(tiny_config(num_labels=3), kind=MRLReDimNetForSequenceClassification)
    save_model(model, tmp_path / "model")
    assert run("rotate", tmp_path / "model", speech, tmp_path / "out") == 0
    with torch.inference_mode():
        assert torch.allclose(load_model(tmp_path / "out")(WAVE).logits, model(WAVE).logits, atol=1e-4)


def test_an_existing_folder_is_refused_and_untouched(folder, checkpoint, speech, tmp_path, capsys):
    before = (folder / "model.safetensors").read_bytes()
    assert "exists already" in refusal(capsys, "rotate", folder, speech, folder)
    assert "exists already" in refusal(capsys, "convert", checkpoint, folder)
    assert (folder / "model.safetensors").read_bytes() == before


@pytest.mark.parametrize("command", ["rotate", "convert"])
def test_a_folder_without_audio_is_refused(folder, checkpoint, tmp_path, capsys, command):
    def arguments(audio):
        if command == "rotate":
            return [command, folder, audio, tmp_path / "out"]
        return [command, checkpoint, tmp_path / "out", "--rotate-on", audio]

    (tmp_path / "empty").mkdir()
    assert "nowhere is not a folder with audio" in refusal(capsys, *arguments(tmp_path / "nowhere"))
    assert "0 audio files" in refusal(capsys, *arguments(tmp_path / "empty"))
    assert not (tmp_path / "out").exists()


# ---------------------------------------------------------------- evaluate


def trial_list(corpus: Path) -> list:
    return ["--trials", corpus / "test" / "trials.txt", "--folder", corpus / "test" / "wav"]


def test_evaluate_prints_a_table(folder, corpus, capsys):
    assert run("evaluate", folder, *trial_list(corpus), "--resamples", 10) == 0
    printed = capsys.readouterr().out
    for part in ("8 dims", "16 dims", "32 dims", "trials ", "EER %", "minDCF", "["):
        assert part in printed


def test_evaluate_at_other_dimensions_without_intervals(folder, corpus, capsys):
    assert run("evaluate", folder, *trial_list(corpus), "--dims", 5, 32, "--resamples", 0) == 0
    printed = capsys.readouterr().out
    assert "5 dims" in printed and "32 dims" in printed and "16 dims" not in printed and "[" not in printed


@pytest.mark.parametrize("dim", [0, 33])
def test_evaluate_refuses_dimensions_the_model_has_not(folder, corpus, capsys, dim):
    message = refusal(capsys, "evaluate", folder, *trial_list(corpus), "--dims", 8, dim)
    assert f"[{dim}] are not between 1 and the embedding's 32" in message


def test_evaluate_says_what_is_missing(folder, corpus, tmp_path, capsys):
    trials = corpus / "test" / "trials.txt"
    assert "no trial list" in refusal(capsys, "evaluate", folder, "--trials", tmp_path / "t", "--folder", tmp_path)
    assert "are not below" in refusal(capsys, "evaluate", folder, "--trials", trials, "--folder", tmp_path)


# ---------------------------------------------------------------- the command


@pytest.mark.parametrize("argv", [[], ["fly"], ["convert"], ["evaluate", "model"]])
def test_an_incomplete_command_is_explained(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2 and "usage: mrl-redimnet" in capsys.readouterr().err
