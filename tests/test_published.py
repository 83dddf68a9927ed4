"""Published checkpoints by name: fetched over real HTTP from a server of these tests, converted, kept; and what a name
of a model stands for."""

import dataclasses
import errno
import io
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from commands import refusal, run
from conftest import relative_error, tiny_model
from huggingface_hub import constants
from reference_weights import reference_waveform
from release_server import ReleaseServer
from test_convert import RECORDINGS, reference_checkpoint

from mrl_redimnet import SpeakerEncoder, published, saving
from mrl_redimnet.adapters import AdapterBank
from mrl_redimnet.convert import ConversionError
from mrl_redimnet.fingerprints import fingerprint
from mrl_redimnet.published import PUBLISHED, FetchError, fetch, find_checkpoint
from mrl_redimnet.saving import load_model, resolve_model, save_model
from mrl_redimnet.training.recipe import Recipe
from mrl_redimnet.training.tasks import start_model
from mrl_redimnet_cli import names

NAME = "IDRnD/b0-vox2-ft_lm"  # nobody states its hash, so it may be any file
CHECKPOINT = PUBLISHED[NAME]
PINNED = PUBLISHED["IDRnD/b2-vox2-ft_lm"]
BY_HAND = f"{CHECKPOINT.file} and run `mrl-redimnet convert {CHECKPOINT.file} OUT`."


def checkpoint_file(name: str = "single_stage") -> bytes:
    content = io.BytesIO()
    torch.save(reference_checkpoint(name), content)
    return content.getvalue()


FILE = checkpoint_file()


@pytest.fixture
def online(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(published, "PAUSE", 0.0)
    yield
    for owner in {checkpoint.owner for checkpoint in PUBLISHED.values()}:
        shutil.rmtree(Path(constants.HF_ASSETS_CACHE) / "mrl-redimnet" / owner, ignore_errors=True)


@pytest.fixture
def release(online, monkeypatch):
    """The authors' release, with one file."""
    with ReleaseServer() as server:
        server.files[CHECKPOINT.file] = FILE
        monkeypatch.setenv("MRL_REDIMNET_MIRROR", f"{server.url}/")
        yield server


def cached() -> set[str]:
    """What the cache has of the checkpoint, without locks."""
    return {file.name for file in CHECKPOINT.cache().iterdir() if file.suffix != ".lock"}


def answers_as_recorded(model) -> bool:
    recorded = torch.tensor(RECORDINGS["single_stage"]["answers"]["16000"]["embedding"])
    with torch.inference_mode():
        return relative_error(model.eval()(reference_waveform(16_000)).embeddings, recorded) < 1e-5


# ---------------------------------------------------------------- the list


def test_the_list_is_whole():
    assert len(PUBLISHED) == 18 + 21
    for checkpoint in PUBLISHED.values():
        assert checkpoint.url == f"{checkpoint.address}{checkpoint.name}.pt" and checkpoint.url.startswith("https://")
        assert checkpoint.corpora and checkpoint.terms and checkpoint.licence in (None, "cc-by-4.0", "cc-by-nc-sa-4.0")
        assert checkpoint.sha256 is None or len(bytes.fromhex(checkpoint.sha256)) == 32
        assert ("VoxBlink2" in checkpoint.corpora) == ("academic research only" in checkpoint.terms)
    assert {checkpoint.network for checkpoint in PUBLISHED.values()} == {"ReDimNet", "ReDimNet2"}


def test_a_name_may_do_without_its_owner():
    assert find_checkpoint("b0-vox2-ft_lm") is find_checkpoint(NAME) is CHECKPOINT
    assert find_checkpoint("b6-vox2-lm").network == "ReDimNet2"
    assert find_checkpoint("me/b0-vox2-ft_lm") is find_checkpoint("b0-vox2-ft_lm.pt") is None
    with pytest.raises(ValueError, match="give IDRnD/b0-vox2-ptn .* or PalabraAI/b0-vox2-ptn"):
        find_checkpoint("b0-vox2-ptn")


def test_the_command_line_knows_the_same_names():
    both = {name for checkpoint in PUBLISHED.values() for name in (checkpoint.id, checkpoint.name)}
    assert set(names.published_names()) == both
    assert Path(saving.MODELS).parent == names.PACKAGE


# ---------------------------------------------------------------- fetching


def test_a_file_is_fetched_once(release):
    file = fetch(CHECKPOINT)
    assert file.read_bytes() == FILE and cached() == {CHECKPOINT.file}
    assert file.is_relative_to(constants.HF_ASSETS_CACHE)
    path = "/IDRnD/ReDimNet/releases/download/latest/b0-vox2-ft_lm.pt"
    assert release.requests == [(path, None)]
    assert fetch(CHECKPOINT) == file
    assert len(release.requests) == 1


def test_a_plus_in_a_name_reaches_the_server(release):
    checkpoint = PUBLISHED["PalabraAI/b6-vb2+vox2_v0-ptn"]
    release.files[checkpoint.file] = FILE
    assert fetch(checkpoint).read_bytes() == FILE


def test_a_broken_connection_is_taken_up_again(release):
    release.breaks = [1000, 10, 5000]
    assert fetch(CHECKPOINT).read_bytes() == FILE
    assert [asked for _, asked in release.requests] == [None, "bytes=1000-", "bytes=1010-", "bytes=6010-"]
    assert cached() == {CHECKPOINT.file}


def test_the_next_call_goes_on_where_the_last_one_ended(release):
    release.breaks = [1000, 0, 0, 0]
    message = "broke after 1,000 bytes .*Call again, and it goes on from there, or download b0-vox2-ft_lm.pt from http"
    with pytest.raises(FetchError, match=message) as error:
        fetch(CHECKPOINT)
    assert str(error.value).endswith(BY_HAND)
    assert cached() == {f"{CHECKPOINT.file}.part", f"{CHECKPOINT.file}.etag"}
    assert fetch(CHECKPOINT).read_bytes() == FILE
    assert release.requests[-1][1] == "bytes=1000-" and cached() == {CHECKPOINT.file}


@pytest.mark.parametrize("etags", [True, False])
def test_parts_of_two_files_are_not_joined(release, etags):
    """The file is replaced between the two calls; or the server does not say whether it was."""
    release.etags, release.breaks = etags, [1000, 0, 0, 0] if etags else [1000, 1000, 1000, 1000]
    with pytest.raises(FetchError, match="broke after"):
        fetch(CHECKPOINT)
    release.files[CHECKPOINT.file], release.breaks = FILE[::-1], []
    assert fetch(CHECKPOINT).read_bytes() == FILE[::-1]


def test_a_part_that_is_longer_than_the_file_is_begun_anew(release):
    release.breaks = [1000, 0, 0, 0]
    with pytest.raises(FetchError, match="broke after"):
        fetch(CHECKPOINT)
    with open(CHECKPOINT.cache() / f"{CHECKPOINT.file}.part", "ab") as file:
        file.write(bytes(len(FILE)))
    assert fetch(CHECKPOINT).read_bytes() == FILE


def test_no_connection(release, monkeypatch):
    release.__exit__()
    message = (
        f"no connection to {release.url}/IDRnD/.*Check the network and the proxy, or download {CHECKPOINT.file} from"
    )
    with pytest.raises(FetchError, match=message) as error:
        fetch(CHECKPOINT)
    assert str(error.value).endswith(BY_HAND) and cached() == set()
    monkeypatch.setenv("MRL_REDIMNET_MIRROR", "nowhere")
    with pytest.raises(FetchError, match="no connection to nowhere/IDRnD"):
        fetch(CHECKPOINT)


def test_a_changed_address(release):
    del release.files[CHECKPOINT.file]
    with pytest.raises(
        FetchError, match=r"nothing at http.* \(status 404\).* look for b0-vox2-ft_lm.pt at https://git"
    ):
        fetch(CHECKPOINT)
    release.status = 503
    with pytest.raises(
        FetchError, match=f"is answered with status 503. Try again later, or download {CHECKPOINT.file}"
    ):
        fetch(CHECKPOINT)
    assert cached() == set()


@pytest.mark.parametrize(
    ("checkpoint", "problem"),
    [
        (PINNED, f"it has {len(FILE):,} bytes, expected 20,582,650"),
        (dataclasses.replace(PINNED, size=None), f"its SHA-256 is .*, expected {PINNED.sha256}"),
    ],
)
def test_another_file_is_set_aside(release, checkpoint, problem):
    release.files[checkpoint.file] = FILE
    with pytest.raises(FetchError, match=problem) as error:
        fetch(checkpoint)
    aside = checkpoint.cache() / f"{checkpoint.file}.refused"
    assert f"It is kept as {aside}" in str(error.value) and aside.read_bytes() == FILE
    assert not (checkpoint.cache() / checkpoint.file).exists()
    with pytest.raises(FetchError, match=problem):
        fetch(checkpoint)
    assert len(release.requests) == 2


def test_the_right_hash(release):
    content = published.hashlib.sha256(FILE).hexdigest()
    assert fetch(dataclasses.replace(CHECKPOINT, size=len(FILE), sha256=content)).read_bytes() == FILE


def test_a_full_disk(release, monkeypatch):
    room = shutil.disk_usage("/")
    monkeypatch.setattr(published.shutil, "disk_usage", lambda folder: room._replace(free=len(FILE) - 1))
    with pytest.raises(FetchError, match="the disk of .* is full. Make room, .* HF_HOME .* or download"):
        fetch(CHECKPOINT)
    assert cached() == set()
    monkeypatch.undo()


def test_a_disk_that_fills_up(release, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(published.os, "replace", full)
    with pytest.raises(FetchError, match="the disk of .* is full"):
        fetch(CHECKPOINT)
    monkeypatch.undo()
    assert not (CHECKPOINT.cache() / CHECKPOINT.file).exists()


def test_a_cache_that_cannot_be_written(release):
    folder = CHECKPOINT.cache()
    folder.rmdir()
    folder.write_text("")
    with pytest.raises(
        FetchError, match="cannot be kept in the cache .*existing file.*Set HF_HOME to a folder that can"
    ):
        fetch(CHECKPOINT)
    folder.unlink()
    (CHECKPOINT.cache() / "converting.lock").mkdir()  # where a file is to be written
    with pytest.raises(FetchError, match="cannot be kept in the cache .*Is a directory.* Set HF_HOME"):
        resolve_model(NAME)


def test_offline(online, release, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(
        FetchError, match="is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: unset it, or down"
    ):
        fetch(CHECKPOINT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    fetch(CHECKPOINT)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(CHECKPOINT).read_bytes() == FILE


# ---------------------------------------------------------------- converting


def test_convert_takes_a_name(release, tmp_path, capsys):
    assert run("convert", "b0-vox2-ft_lm", tmp_path / "my-b0") == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{NAME}, trained on VoxCeleb2. The authors say that") and "32 dimensions" in printed
    assert answers_as_recorded(load_model(tmp_path / "my-b0"))
    card = (tmp_path / "my-b0/README.md").read_text()
    assert "license: cc-by-4.0" in card and f"[{CHECKPOINT.file}](https://github.com/IDRnD/" in card
    assert "# my-b0" in card


def test_convert_says_what_is_wrong_with_a_name(release, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    message = refusal(capsys, "convert", "b0-vox2-ftlm", "out")
    assert "no file b0-vox2-ftlm, and no published checkpoint of that name (the nearest: b0-vox2-ft_lm" in message
    assert "the nearest: b2-vox2-ft_lm" in refusal(capsys, "convert", "b2-vox2-ft_lm.pt", "out")
    assert "give IDRnD/b1-vox2-ptn" in refusal(capsys, "convert", "b1-vox2-ptn", "out")
    assert "embedding_size: 8 is less" in refusal(capsys, "convert", NAME, "out", "--embedding-size", 8)
    assert cached() == {CHECKPOINT.file}  # the file is right
    (tmp_path / NAME).mkdir(parents=True)
    assert f"{NAME} is not a file" in refusal(capsys, "convert", "./" + NAME, "out")
    assert not (tmp_path / "out").exists()


def test_a_file_of_the_name_is_taken_before_the_name(release, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("b0-vox2-ft_lm").write_bytes(checkpoint_file("single_stage"))
    assert run("convert", "b0-vox2-ft_lm", "out") == 0
    assert release.requests == []


def test_a_page_in_the_place_of_the_file(release):
    """As the log-in page of a network answers. Nobody states the size or the hash, so the conversion must see it."""
    release.files[CHECKPOINT.file] = b"<html>Please log in</html>"
    with pytest.raises(
        FetchError, match="is not used: it cannot be converted .*cannot be read as a PyTorch checkpoint"
    ):
        load_model(NAME)
    assert cached() == {f"{CHECKPOINT.file}.refused"}
    release.files[CHECKPOINT.file] = FILE
    assert answers_as_recorded(load_model(NAME))


def test_a_pinned_file_that_cannot_be_converted_is_kept(release, monkeypatch):
    content = published.hashlib.sha256(b"nothing").hexdigest()
    checkpoint = dataclasses.replace(CHECKPOINT, sha256=content)
    release.files[CHECKPOINT.file] = b"nothing"
    with pytest.raises(ConversionError):
        saving.convert_published(checkpoint)
    assert cached() == {CHECKPOINT.file}


# ---------------------------------------------------------------- what a name stands for


def test_the_encoder_takes_a_name(release, monkeypatch):
    encoder = SpeakerEncoder.from_pretrained(NAME, device="cpu")
    assert encoder.name == NAME and answers_as_recorded(encoder.model) and encoder.commit is None
    assert encoder.thresholds() is None
    assert cached() == {CHECKPOINT.file, *(folder.name for folder in CHECKPOINT.cache().glob("model-*"))}
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # the second time nothing is fetched
    again = SpeakerEncoder.from_pretrained("b0-vox2-ft_lm", device="cpu")
    assert fingerprint(again.model) == fingerprint(encoder.model) and len(release.requests) == 1
    card = (resolve_model(NAME) / "README.md").read_text()
    assert "# b0-vox2-ft_lm" in card and "VoxCeleb2" in card


def test_a_bank_takes_a_name(release):
    assert AdapterBank.load(NAME).base.repository == NAME


def test_training_starts_from_a_name(release):
    model, fresh = start_model(saving.MRLReDimNetModel, Recipe(model={"start": NAME}))
    assert not fresh and answers_as_recorded(model)


@pytest.mark.slow
def test_two_processes_fetch_once(release):
    code = "import sys; from mrl_redimnet.saving import resolve_model; print(resolve_model(sys.argv[1]))"
    environment = {**os.environ, "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code, NAME]
    running = [subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) for _ in range(2)]
    found = {process.communicate()[0].strip() for process in running}
    assert len(release.requests) == 1 and found == {str(resolve_model(NAME))}


@pytest.fixture
def packaged(tmp_path, monkeypatch) -> Path:
    """A model called "tiny" that comes with the package, as far as anybody can see."""
    monkeypatch.setattr(saving, "MODELS", tmp_path / "models")
    monkeypatch.setattr(names, "PACKAGE", tmp_path)
    shutil.copy(Path(saving.__file__).with_name("published.json"), tmp_path)
    save_model(tiny_model(), tmp_path / "models/tiny")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return tmp_path / "models/tiny"


def test_a_model_that_comes_with_the_package(packaged, capsys):
    assert resolve_model("tiny") == packaged
    encoder = SpeakerEncoder.from_pretrained("tiny", device="cpu")
    assert encoder.name == "tiny" and fingerprint(encoder.model) == fingerprint(tiny_model())
    capsys.readouterr()
    message = refusal(capsys, "verify", "tiny", "no.wav", "--test", "no.wav")
    assert "MODEL" not in message and "ENROL: no file no.wav" in message
    assert "or the name of a model (the nearest: tiny)" in refusal(capsys, "rotate", "tinyy", ".", "out")
    with pytest.raises(FileNotFoundError, match=r"or one of tiny\. The nearest names: tiny\."):
        resolve_model("tinyy")


def test_a_folder_is_taken_before_a_name(packaged):
    for name in ("tiny", NAME):
        save_model(tiny_model(seed=3), Path(name))
        assert resolve_model(name) == name
        assert fingerprint(load_model(name)) == fingerprint(tiny_model(seed=3))
    assert resolve_model(Path(NAME)) == Path(NAME)
    with pytest.raises(FileNotFoundError, match="b2-vox2-ft_lm is not a folder"):
        resolve_model(Path("b2-vox2-ft_lm"))


def test_other_names_are_hub_ids_or_wrong():
    assert resolve_model("me/b0-vox2-ft_lm") == "me/b0-vox2-ft_lm"
    assert resolve_model("PalabraAI/something") == "PalabraAI/something"
    with pytest.raises(FileNotFoundError, match="The nearest names: IDRnD/b0-vox2-ft_lm, "):
        resolve_model("IDRnD/b0-vox2-ftlm")
    with pytest.raises(FileNotFoundError, match="The nearest names: b6-vox2-lm, "):
        resolve_model("b6_vox2-lm")
