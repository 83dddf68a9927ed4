"""Adapters and bases on a Hub: the real client against a Hub on this machine, over HTTP."""

import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import local_hub
import pytest
import torch
from conftest import tiny_model, waves
from huggingface_hub import HfApi, ModelCard, constants
from local_hub import ANNA, BERT, READER, Blob, LocalHub
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file

from modeling_mrl_redimnet import MRLReDimNetModel
from mrl_redimnet.adapters import AdapterBank, AdapterFacts, Base, fingerprint, lora_config
from mrl_redimnet.adapters.hub import (
    ALLOWED,
    ALLOWED_IN_BASE,
    HubError,
    adapter_info,
    default_repository,
    list_adapters,
    pull,
    push_adapter,
    push_base,
)
from mrl_redimnet.saving import code_files, load_model, save_model
from mrl_redimnet_cli import main as command

BASE = "anna/nano"
REPOSITORY = "anna/nano-telephony"

ANOTHER_MACHINE = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModel

torch.set_num_threads(1)
base, adapter, waves, out = sys.argv[1:]
model = AutoModel.from_pretrained(base, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules."), type(model)
model = PeftModel.from_pretrained(model, adapter).eval()
with torch.inference_mode():
    save_file({"embeddings": model(input_values=load_file(waves)["waves"]).embeddings}, out)
"""


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A saved base, and an adapter trained on it from where it lies."""
    root = tmp_path_factory.mktemp("here")
    save_model(tiny_model(), root / "base")
    base = MRLReDimNetModel.from_pretrained(root / "base").eval()
    facts = AdapterFacts("telephony", Base(BASE, "main", fingerprint(base)))
    model = get_peft_model(base, lora_config("linear", r=4))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    model.save_pretrained(root / "adapter")
    facts.save(root / "adapter")
    return root


@pytest.fixture
def adapter(folders, tmp_path) -> Path:
    """A copy of the adapter to change."""
    return Path(shutil.copytree(folders / "adapter", tmp_path / "adapter"))


@pytest.fixture(params=["regular", "lfs"])
def any_hub(request, connected):
    """A Hub that takes weights in either way."""
    connected.lfs = request.param == "lfs"
    return connected


def files_of(hub: LocalHub, repository: str, revision: str = "main") -> dict[str, bytes]:
    """What the Hub holds, but for what every repository begins with."""
    found = hub.repositories[repository]
    files = found.commits[found.resolve(revision)].files
    return {name: blob.content for name, blob in files.items() if name != ".gitattributes"}


def read_folder(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def says(error, *parts: str):
    """The message has these parts, and no token."""
    for part in parts:
        assert part in str(error.value)
    for token in (ANNA, READER, BERT):
        assert token not in str(error.value)


def test_default_repository():
    assert default_repository(BASE, "telephony") == REPOSITORY


@pytest.mark.parametrize("logged_in", [False, True])
def test_base_comes_back_as_it_was(any_hub, folders, monkeypatch, logged_in):
    if logged_in:
        monkeypatch.setenv("HF_TOKEN", ANNA)
    pushed = push_base(folders / "base", BASE, token=None if logged_in else ANNA)
    assert pushed.changed and not pushed.left_out
    assert pushed.url == f"{any_hub.url}/{BASE}"
    assert bool(any_hub.large_files) == any_hub.lfs
    pulled = pull(BASE)
    assert pulled.name == pushed.commit
    expected = read_folder(folders / "base")
    expected["README.md"] = expected["README.md"].replace(b"PATH_OR_HUB_ID", BASE.encode())
    assert read_folder(pulled) == expected
    assert BASE.encode() in expected["README.md"]


def test_adapter_comes_back_with_the_base_repository(any_hub, folders):
    before = read_folder(folders / "adapter")
    assert str(folders).encode() in before["adapter_config.json"]
    assert str(folders).encode() in before["README.md"]
    push_adapter(folders / "adapter", REPOSITORY, token=ANNA)
    assert read_folder(folders / "adapter") == before
    pulled = read_folder(pull(REPOSITORY))
    assert pulled.keys() == before.keys()
    assert pulled["adapter_model.safetensors"] == before["adapter_model.safetensors"]
    assert AdapterFacts.load(pull(REPOSITORY)) == AdapterFacts.load(folders / "adapter")
    config = json.loads(pulled["adapter_config.json"])
    assert (config.pop("base_model_name_or_path"), config.pop("revision")) == (BASE, "main")
    assert config.items() <= json.loads(before["adapter_config.json"]).items()
    card = ModelCard(pulled["README.md"].decode())
    assert (card.data.base_model, card.data.library_name) == (BASE, "peft")
    assert {"lora", "transformers", f"base_model:adapter:{BASE}", "domain:telephony"} == set(card.data.tags)
    for content in any_hub.large_files.values() if any_hub.lfs else files_of(any_hub, REPOSITORY).values():
        assert str(folders).encode() not in content


def test_sends_one_commit_of_allowed_files(hub, adapter):
    for name in ("notes.txt", "train.py", "curve.png", "picture.jpg", "drawing.svg", ".secret.json"):
        (adapter / name).write_bytes(b"{}")
    (adapter / "more").mkdir()
    (adapter / "more" / "results.json").write_text("{}")
    pushed = push_adapter(adapter, REPOSITORY)
    assert pushed.left_out == ("notes.txt", "train.py")
    assert files_of(hub, REPOSITORY).keys() == {
        "README.md", "adapter_config.json", "adapter_model.safetensors", "mrl_redimnet_adapter.json", "curve.png",
        "picture.jpg", "drawing.svg", "more/results.json",
    }  # fmt: skip
    assert len([request for request in hub.requests if "/commit/" in request]) == 1
    assert {"*.py"} == set(ALLOWED_IN_BASE) - set(ALLOWED)


def test_card_of_its_own_is_kept(hub, adapter):
    (adapter / "README.md").write_text(
        '---\nlicense: mit\ntags:\n- telephony\n---\n# Mine\n\n`PeftModel.from_pretrained(base, "PATH_OR_HUB_ID")`\n'
    )
    push_adapter(adapter, REPOSITORY)
    sent = ModelCard(files_of(hub, REPOSITORY)["README.md"].decode())
    assert sent.data.license == "mit"
    assert set(sent.data.tags) == {"telephony", "lora", f"base_model:adapter:{BASE}", "domain:telephony"}
    assert f'# Mine\n\n`PeftModel.from_pretrained(base, "{REPOSITORY}")`' in sent.text
    pulled = pull(REPOSITORY)
    assert not push_adapter(pulled, REPOSITORY).changed


def test_adapter_without_card_or_facts(hub, adapter):
    """PEFT's two files are enough, if they name a base on the Hub."""
    (adapter / "README.md").unlink()
    (adapter / "mrl_redimnet_adapter.json").unlink()
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY)
    says(error, "not a repository on the Hub", "Push the base first", "base=")
    assert not hub.requests
    push_adapter(adapter, REPOSITORY, base=BASE)
    assert ModelCard(files_of(hub, REPOSITORY)["README.md"].decode()).data.base_model == BASE
    (row,) = list_adapters(BASE)
    assert (row.repository, row.domain) == (REPOSITORY, None)
    info = adapter_info(REPOSITORY)
    assert (info.facts, info.base) == (None, BASE)


def test_base_that_was_local_is_renamed_everywhere(hub, adapter):
    facts = AdapterFacts.load(adapter)
    replace(facts, base=replace(facts.base, repository="nano-of-today")).save(adapter)
    (adapter / "README.md").write_text('# Mine\n\n`nano-of-today`, "nano-of-today", not nano-of-today2\n')
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY)
    says(error, "'nano-of-today'", "base=")
    push_adapter(adapter, REPOSITORY, base=BASE)
    pulled = pull(REPOSITORY)
    assert AdapterFacts.load(pulled).base == Base(BASE, None, facts.base.fingerprint)
    assert f'`{BASE}`, "{BASE}", not nano-of-today2' in (pulled / "README.md").read_text()


def test_base_that_names_a_folder_here(hub, adapter, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path(BASE).mkdir(parents=True)
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY)
    says(error, repr(BASE), "a folder here")
    assert push_adapter(adapter, REPOSITORY, base=BASE).changed


@pytest.mark.parametrize("name", ["README.md", "results.json"])
def test_path_elsewhere_in_a_text(hub, adapter, name):
    with (adapter / name).open("a") as file:
        file.write(f"\nsee {adapter.resolve()}/log\n")
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY)
    says(error, name, str(adapter), "Remove it")
    assert not hub.requests


def test_unchanged_push_makes_no_commit(any_hub, folders):
    first = push_adapter(folders / "adapter", REPOSITORY, token=ANNA)
    again = push_adapter(folders / "adapter", REPOSITORY, token=ANNA, tag="v1")
    assert (first.changed, again.changed) == (True, False)
    assert again.commit == first.commit
    assert len(any_hub.repositories[REPOSITORY].commits) == 2
    assert any_hub.repositories[REPOSITORY].tags == {"v1": first.commit}


def test_revisions_and_tags(hub, adapter):
    first = push_adapter(adapter, REPOSITORY, tag="v1", message="the first")
    (adapter / "note.md").write_text("second")
    second = push_adapter(adapter, REPOSITORY)
    (adapter / "note.md").write_text("other")
    other = push_adapter(adapter, REPOSITORY, revision="trial")
    assert hub.repositories[REPOSITORY].commits[first.commit].title == "the first"
    assert not (pull(REPOSITORY, revision="v1") / "note.md").exists()
    assert (pull(REPOSITORY) / "note.md").read_text() == "second"
    for revision in ("trial", other.commit):
        assert (pull(REPOSITORY, revision=revision) / "note.md").read_text() == "other"
    assert adapter_info(REPOSITORY, revision="v1").revision == first.commit
    assert adapter_info(REPOSITORY).revision == second.commit
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY, revision="trial", tag="v1")
    says(error, "has the tag v1", first.commit, other.commit, "another tag")
    for look in (pull, adapter_info):
        with pytest.raises(HubError) as error:
            look(REPOSITORY, revision="v9")
        says(error, REPOSITORY, "'v9'", "no branch, tag or commit")


def test_private_repository(connected, adapter, monkeypatch):
    push_adapter(adapter, REPOSITORY, private=True, token=ANNA)
    for token, why in ((None, "no token was given"), (BERT, "may not read it")):
        assert list_adapters(BASE, token=token) == []
        for look in (pull, adapter_info):
            with pytest.raises(HubError) as error:
                look(REPOSITORY, token=token)
            says(error, REPOSITORY, "no such repository, or it is private", why)
    for call in (pull, adapter_info, lambda name, token: list_adapters(BASE, token=token)):
        with pytest.raises(HubError, match="does not know the token"):
            call(REPOSITORY, token="hf_unknown")
    for token in (ANNA, READER):
        assert [row.private for row in list_adapters(BASE, token=token)] == [True]
        assert adapter_info(REPOSITORY, token=token).rank == 4
        assert pull(REPOSITORY, token=token).is_dir()


def test_private_push_to_a_public_repository(hub, adapter):
    push_adapter(adapter, REPOSITORY)
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY, private=True)
    says(error, REPOSITORY, "is public")
    assert len(hub.repositories[REPOSITORY].commits) == 2


def test_list_has_the_adapters_of_one_base(hub, folders, adapter):
    push_base(folders / "base", BASE)
    push_adapter(adapter, REPOSITORY)
    facts = AdapterFacts.load(adapter)
    for domain, base in (("far", BASE), ("noisy", "anna/nano2")):
        replace(facts, domain=domain, base=replace(facts.base, repository=base)).save(adapter)
        pushed = push_adapter(adapter, default_repository(base, domain))
    replace(facts, domain="whisper").save(adapter)
    push_adapter(adapter, "bert/whisper", token=BERT)
    rows = list_adapters(BASE)
    names = ["anna/nano-far", "anna/nano-telephony", "bert/whisper"]
    assert [(row.repository, row.domain) for row in rows] == [*zip(names, ["far", "telephony", "whisper"], strict=True)]
    assert [row.repository for row in list_adapters(BASE, author="anna")] == names[:2]
    (row,) = list_adapters("anna/nano2")
    assert (row.revision, row.downloads, row.private) == (pushed.commit, 0, False)
    assert abs(row.modified.timestamp() - time.time()) < 600
    assert list_adapters("anna/none") == []


def test_a_base_and_its_adapters_are_collected(hub, folders, adapter, capsys):
    push_base(folders / "base", BASE)
    first = push_adapter(adapter, REPOSITORY, collection=True)
    assert command(["adapters", "push", str(adapter), "anna/nano-far", "--collection"]) == 0
    assert capsys.readouterr().out.endswith(f"In the collection {first.collection}.\n")
    of_bert = push_adapter(adapter, "bert/whisper", private=True, collection=True, token=BERT)
    for pushed, owner, private, items in (
        (first, "anna", False, [BASE, REPOSITORY, "anna/nano-far"]),
        (of_bert, "bert", True, [BASE, "bert/whisper"]),
    ):
        slug = pushed.collection.removeprefix(f"{hub.url}/collections/")
        found = HfApi(token=BERT).get_collection(slug)
        assert (found.title, found.owner, found.private) == (f"Adapters of {BASE}", owner, private)
        assert [item.item_id for item in found.items] == items
    assert push_adapter(adapter, REPOSITORY).collection is None


def test_what_cannot_be_collected(hub, folders, adapter):
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY, collection=True)
    says(error, f"Cannot collect the adapters of {BASE}", "no such repository")
    assert REPOSITORY not in hub.repositories
    push_base(folders / "base", BASE)
    hub.break_off_at("collection")
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY, collection=True)
    says(error, f"{REPOSITORY} into the collection of {BASE}'s adapters", "broke off", "The files are there")
    hub.break_off_at()
    assert not push_adapter(adapter, REPOSITORY, collection=True).changed
    (found,) = hub.collections.values()
    assert [item["id"] for item in found["items"]] == [BASE, REPOSITORY]


def test_results_in_the_form_of_the_hub_are_pushed(hub, adapter):
    """Of hidden files these alone; and they come back."""
    (adapter / ".eval_results").mkdir()
    entry = "- dataset: {id: anna/calls, task_id: short}\n  value: 1.5\n"
    for name in (".eval_results/short-64.yaml", ".eval_results/.draft.yaml", ".eval_results/notes.txt", "x.yaml"):
        (adapter / name).write_text(entry)
    pushed = push_adapter(adapter, REPOSITORY)
    assert pushed.left_out == (".eval_results/notes.txt", "x.yaml")
    assert (pull(REPOSITORY) / ".eval_results" / "short-64.yaml").read_text() == entry
    assert {name for name in files_of(hub, REPOSITORY) if "eval" in name} == {".eval_results/short-64.yaml"}


def test_info_reads_headers_only(any_hub, folders):
    pushed = push_adapter(folders / "adapter", REPOSITORY, token=ANNA)
    any_hub.requests.clear()
    remote, local = adapter_info(REPOSITORY), adapter_info(folders / "adapter")
    weights = [request for request in any_hub.requests if request.endswith(".safetensors")]
    assert len(weights) == 1
    assert not [*Path(constants.HF_HUB_CACHE).rglob("*.safetensors")]
    assert replace(remote, source=local.source, revision=None, base=local.base) == local
    assert (remote.source, remote.revision, remote.base) == (REPOSITORY, pushed.commit, BASE)
    assert (local.rank, local.placement, local.facts.domain) == (4, "linear", "telephony")
    file = folders / "adapter" / "adapter_model.safetensors"
    assert local.size == file.stat().st_size
    assert local.parameters == sum(tensor.numel() for tensor in load_file(file).values())


def test_info_of_a_list_of_layers(adapter):
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"target_modules": ["v_proj", "q_proj"]}))
    assert adapter_info(adapter).placement == "q_proj, v_proj"


@pytest.mark.parametrize("stage", ["lfs", "commit"])
def test_push_that_breaks_off_changes_nothing(hub, adapter, stage):
    hub.lfs = True
    hub.break_off_at(stage)
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY)
    says(error, REPOSITORY, hub.url, "broke off", "whole or not at all", f"new repository {REPOSITORY} stays")
    assert files_of(hub, REPOSITORY) == {}
    hub.break_off_at()
    first = push_adapter(adapter, REPOSITORY)
    assert first.changed
    before = files_of(hub, REPOSITORY)
    save_file({"a": torch.zeros(3)}, adapter / "adapter_model.safetensors")
    (adapter / "note.md").write_text("new")
    hub.break_off_at(stage)
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY)
    assert "new repository" not in str(error.value)
    assert files_of(hub, REPOSITORY) == before
    assert hub.repositories[REPOSITORY].branches == {"main": first.commit}
    hub.break_off_at()
    assert push_adapter(adapter, REPOSITORY).changed
    assert files_of(hub, REPOSITORY)["note.md"] == b"new"


def test_hub_that_does_not_know_xet(hub, adapter, monkeypatch):
    hub.lfs = True
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY)
    says(error, REPOSITORY, hub.url, "HF_HUB_DISABLE_XET=1")
    assert files_of(hub, REPOSITORY) == {}


def test_push_whose_answer_was_lost_can_be_repeated(hub, adapter):
    hub.break_off_at("answer")
    with pytest.raises(HubError, match="whole or not at all"):
        push_adapter(adapter, REPOSITORY, tag="v1")
    hub.break_off_at()
    again = push_adapter(adapter, REPOSITORY, tag="v1")
    assert not again.changed
    assert hub.repositories[REPOSITORY].tags == {"v1": again.commit}


def test_push_into_anothers_push(hub, adapter, monkeypatch):
    push_adapter(adapter, REPOSITORY)
    send = HfApi.preupload_lfs_files

    def interrupted(*args, **kwargs):
        monkeypatch.setattr(HfApi, "preupload_lfs_files", send)
        (theirs / "theirs.md").write_text("theirs")
        push_adapter(theirs, REPOSITORY)
        send(*args, **kwargs)

    theirs = Path(shutil.copytree(adapter, adapter.with_name("theirs")))
    (adapter / "ours.md").write_text("ours")
    monkeypatch.setattr(HfApi, "preupload_lfs_files", interrupted)
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY)
    says(error, "somebody else pushed")
    assert {"theirs.md", "ours.md"} & files_of(hub, REPOSITORY).keys() == {"theirs.md"}
    assert len(hub.repositories[REPOSITORY].commits) == 3


@pytest.mark.parametrize(
    "token, parts",
    [
        (None, ["no token for", "hf auth login"]),
        ("hf_unknown", ["does not know the token", "hf auth login"]),
        (READER, ["may not do this", "write access"]),
        (BERT, ["may not do this", "an account that owns"]),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_push_without_rights(connected, adapter, token, parts, exists):
    if exists:
        push_adapter(adapter, REPOSITORY, token=ANNA)
        (adapter / "note.md").write_text("new")
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY, token=token)
    says(error, REPOSITORY, *parts)
    assert "hf_unknown" not in str(error.value)
    assert exists == (REPOSITORY in connected.repositories)
    assert not exists or "note.md" not in files_of(connected, REPOSITORY)


def test_gated_repository(connected, adapter):
    push_adapter(adapter, REPOSITORY, token=ANNA)
    connected.repositories[REPOSITORY].gated = True
    with pytest.raises(HubError) as error:
        pull(REPOSITORY, token=BERT)
    says(error, "gated", f"{connected.url}/{REPOSITORY}")


@pytest.mark.parametrize("name", ["adapter_model.bin", "optimizer.pt", "best.pth", "last.ckpt", "more/x.pkl"])
def test_pickles_are_not_pushed(hub, folders, adapter, name):
    base = Path(shutil.copytree(folders / "base", adapter.with_name("base")))
    for folder, push in ((adapter, push_adapter), (base, push_base)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"")
        with pytest.raises(HubError) as error:
            push(folder, REPOSITORY)
        says(error, str(folder), name, "pickle", "safetensors")
    assert not hub.requests


def test_pickles_are_not_pulled(hub, adapter):
    push_adapter(adapter, REPOSITORY)
    main = hub.repositories[REPOSITORY].commits[hub.repositories[REPOSITORY].branches["main"]]
    main.files["pytorch_model.bin"] = Blob(b"a pickle")
    assert not (pull(REPOSITORY) / "pytorch_model.bin").exists()
    push_adapter(adapter, "anna/pickle")
    main = hub.repositories["anna/pickle"].commits[hub.repositories["anna/pickle"].branches["main"]]
    main.files["adapter_model.bin"] = main.files.pop("adapter_model.safetensors")
    hub.requests.clear()
    for look in (pull, adapter_info):
        with pytest.raises(HubError) as error:
            look("anna/pickle")
        says(error, "anna/pickle", "adapter_model.bin", "pickle")
    assert not [request for request in hub.requests if "/resolve/" in request]


def test_a_model_that_is_pickle_only_is_not_loaded(hub, folders):
    push_base(folders / "base", BASE)
    main = hub.repositories[BASE].commits[hub.repositories[BASE].branches["main"]]
    main.files["pytorch_model.bin"] = main.files.pop("model.safetensors")
    for load in (load_model, AdapterBank.load, MRLReDimNetModel.from_pretrained):
        with pytest.raises(OSError, match="pickle only .* it, .*save_pretrained"):
            load(BASE)


def test_a_model_that_cannot_be_loaded_is_not_pushed(hub, folders, tmp_path):
    broken = Path(shutil.copytree(folders / "base", tmp_path / "base"))
    tensors = load_file(broken / "model.safetensors")
    del tensors["projection.segments.0.weight"]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(HubError, match="cannot be loaded, so it is not pushed: .*1 tensor is missing"):
        push_base(broken, BASE)
    assert not hub.requests


def test_not_an_adapter(hub, folders, adapter, tmp_path):
    for missing in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copytree(folders / "adapter", tmp_path / missing)
        (tmp_path / missing / missing).unlink()
        with pytest.raises(HubError) as error:
            push_adapter(tmp_path / missing, REPOSITORY)
        says(error, str(tmp_path / missing), f"no {missing}")
        with pytest.raises(HubError, match="is no adapter"):
            adapter_info(tmp_path / missing)
    with pytest.raises(HubError, match="is not a folder"):
        push_adapter(tmp_path / "nothing", REPOSITORY)
    assert not hub.requests
    push_base(folders / "base", BASE)
    with pytest.raises(HubError, match="anna/nano is no adapter"):
        adapter_info(BASE)
    HfApi().create_repo("anna/empty")
    with pytest.raises(HubError, match="anna/empty is neither a model nor an adapter"):
        pull("anna/empty")


@pytest.mark.parametrize(
    "name, content, part",
    [
        ("adapter_model.safetensors", None, "not a whole safetensors file"),
        ("adapter_config.json", b"{", "not JSON"),
        ("adapter_config.json", b"[]", "not a JSON object"),
        ("mrl_redimnet_adapter.json", b"{}", "not a description of an adapter"),
        ("README.md", b"---\ntags: [\n---\n", "metadata"),
        ("README.md", b"\xff", "not UTF-8"),
    ],
)
def test_broken_files_are_not_pushed(hub, adapter, name, content, part):
    whole = (adapter / name).read_bytes()
    (adapter / name).write_bytes(whole[:-10] if content is None else content)
    with pytest.raises(HubError) as error:
        push_adapter(adapter, REPOSITORY)
    says(error, str(adapter / name), part)
    assert not hub.requests


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors", *(file.name for file in code_files())])
def test_not_a_base(hub, folders, tmp_path, missing):
    folder = Path(shutil.copytree(folders / "base", tmp_path / "base"))
    (folder / missing).unlink()
    with pytest.raises(HubError) as error:
        push_base(folder, BASE)
    says(error, str(folder), missing)
    assert not hub.requests


@pytest.mark.parametrize("name", ["anna/nano/far", "/home/anna/nano", "anna/na no", "anna/nano--far"])
def test_invalid_names(hub, adapter, name):
    for call in (pull, adapter_info, list_adapters, lambda name: push_adapter(adapter, name)):
        with pytest.raises(HubError, match="neither a folder nor a Hub id") as error:
            call(name)
        says(error, repr(name))
    with pytest.raises(HubError, match="'nano' lacks its owner: give user/nano"):
        push_adapter(adapter, "nano")
    assert not hub.requests


def test_unreachable(hub, adapter):
    push_adapter(adapter, REPOSITORY)
    pull(REPOSITORY)
    hub.__exit__()
    for call in (pull, adapter_info, list_adapters, lambda name: push_adapter(adapter, name)):
        with pytest.raises(HubError) as error:
            call(REPOSITORY)
        says(error, REPOSITORY, "no connection", hub.url, "HF_ENDPOINT")
    assert pull(REPOSITORY, local_files_only=True).is_dir()


def test_offline(hub, folders, adapter, monkeypatch):
    push_base(folders / "base", BASE)
    pushed = push_adapter(adapter, REPOSITORY, tag="v1")
    online = [pull(BASE), pull(REPOSITORY), pull(REPOSITORY, revision="v1")]
    online_info = adapter_info(REPOSITORY)
    hub.__exit__()
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert [pull(BASE), pull(REPOSITORY), pull(REPOSITORY, revision="v1")] == online
    assert adapter_info(REPOSITORY) == online_info
    assert online_info.revision == pushed.commit
    for call in (pull, adapter_info):
        with pytest.raises(HubError) as error:
            call("anna/other")
        says(error, "anna/other", "not (wholly) in the cache", "HF_HUB_OFFLINE")
    with pytest.raises(HubError) as error:
        pull(REPOSITORY, revision="v2")
    says(error, "v2")
    for call in (list_adapters, lambda name: push_adapter(adapter, name)):
        with pytest.raises(HubError, match="HF_HUB_OFFLINE is set"):
            call(REPOSITORY)


def run(command: list, environment: dict[str, str], folder: Path):
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.mark.slow
def test_another_machine(folders, tmp_path):
    """Nothing of this package there: an empty cache, plain transformers and PEFT, and then without the Hub."""
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    environment |= {"HOME": str(tmp_path), "HF_HOME": str(tmp_path / "hf"), "OMP_NUM_THREADS": "1", "HF_TOKEN": ANNA}
    save_file({"waves": torch.stack(waves(4_800, 4_800))}, tmp_path / "waves")
    server = [sys.executable, local_hub.__file__, "--token", ANNA, "--user", "anna"]
    push = (
        "import sys; from mrl_redimnet.adapters.hub import *; base, adapter, name = sys.argv[1:]\n"
        "push_base(base, name, private=True); push_adapter(adapter, default_repository(name, 'telephony'))"
    )
    load = [sys.executable, "-I", "-c", ANOTHER_MACHINE, BASE, REPOSITORY, tmp_path / "waves"]
    with subprocess.Popen(server, stdout=subprocess.PIPE, text=True) as hub:
        try:
            environment["HF_ENDPOINT"] = hub.stdout.readline().strip()
            run([sys.executable, "-c", push, folders / "base", folders / "adapter", BASE], environment, tmp_path)
            run([*load, tmp_path / "online"], environment, tmp_path)
        finally:
            hub.terminate()
    run([*load, tmp_path / "offline"], environment | {"HF_HUB_OFFLINE": "1"}, tmp_path)
    base = MRLReDimNetModel.from_pretrained(folders / "base").eval()
    batch = load_file(tmp_path / "waves")["waves"]
    with torch.inference_mode():
        without = base(input_values=batch).embeddings
        expected = PeftModel.from_pretrained(base, folders / "adapter").eval()(input_values=batch).embeddings
    assert not torch.allclose(without, expected, rtol=0.01)
    for out in ("online", "offline"):
        torch.testing.assert_close(load_file(tmp_path / out)["embeddings"], expected, rtol=0, atol=0)
