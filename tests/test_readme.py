"""What the documents tell users to type works as it stands."""

import contextlib
import io
import re
import shlex
from pathlib import Path

import pytest
import soundfile
import torch
from conftest import tiny_model, waves
from peft import AutoPeftModelForFeatureExtraction, get_peft_model
from transformers import AutoModel

import mrl_redimnet_cli as cli
import train_hf  # noqa: F401  the commands below name it
from mrl_redimnet.adapters import lora_config
from mrl_redimnet.hub_cards import base_card
from mrl_redimnet.saving import save_model
from mrl_redimnet.training.reading import parse_command_line

ROOT = Path(__file__).resolve().parents[1]
# Without the generated reference of settings, whose commands are patterns.
WRITTEN = [ROOT / "README.md", *sorted(set((ROOT / "docs").glob("[a-z]*.md")) - {ROOT / "docs" / "recipe.md"})]
PAGES = {file.name: file.read_text() for file in WRITTEN}
README = PAGES["README.md"]
EVERYTHING = "\n".join(PAGES.values())


def blocks(text: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def examples() -> list:
    """Python code on the pages, and the output that stands below it: one parameter each."""
    pattern = r"^```python\n(.*?)^```\n(?:\n```text\n(.*?)^```)?"
    return [
        pytest.param(*found.groups(), id=f"{page}-{number}")
        for page, text in PAGES.items()
        for number, found in enumerate(re.finditer(pattern, text, flags=re.DOTALL | re.MULTILINE))
    ]


@pytest.mark.parametrize("code, output", examples())
def test_python_prints_what_stands_below_it(code, output, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "example", "exec"), {})
    assert output is None or printed.getvalue() == output


def test_the_readme_begins_with_an_example_and_its_output():
    (first,) = blocks(README, "python")[:1]
    assert README[README.index(first) + len(first) :].startswith("```\n\n```text\n")


def commands(program: str) -> list[list[str]]:
    """The pages' shell lines that run `program`, as the arguments behind it."""
    lines = [line for block in blocks(EVERYTHING, "bash") for line in block.replace("\\\n", " ").splitlines()]
    unique = dict.fromkeys(line for line in lines if line.startswith(program))
    return [shlex.split(line, comments=True)[1:] for line in unique]


@pytest.mark.parametrize("arguments", commands("mrl-redimnet"), ids=" ".join)
def test_commands_parse(arguments):
    assert cli.make_parser().parse_args(arguments).run


@pytest.mark.parametrize("arguments", commands("accelerate launch"), ids=" ".join)
def test_training_lines_parse(arguments, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert arguments[:2] == ["launch", "train_hf.py"]
    recipe, resume = parse_command_line(arguments[2:], "")
    assert recipe.schedule.steps > 0 and not resume


def test_lines_load_a_base_with_its_adapter(tmp_path):
    model = tiny_model()
    save_model(model, tmp_path / "base")
    adapted = get_peft_model(tiny_model(), lora_config("linear", 2, init_lora_weights=False)).eval()
    adapted.peft_config["default"].base_model_name_or_path = str(tmp_path / "base")
    adapted.save_pretrained(tmp_path / "adapter")
    lines = [
        line for block in blocks(PAGES["adapters.md"], "py") for line in block.splitlines() if "ADAPTER_REPO" in line
    ]
    assert len(lines) == 2
    names = {"AutoModel": AutoModel, "AutoPeftModelForFeatureExtraction": AutoPeftModelForFeatureExtraction}
    batch = {"input_values": waves(8000)[0][None]}
    with torch.inference_mode():
        expected, of_base = adapted(**batch).embeddings, model(**batch).embeddings
        assert not torch.allclose(expected, of_base)
        for line in lines:
            loaded = eval(line.removeprefix("model = "), names | {"ADAPTER_REPO": str(tmp_path / "adapter")})
            assert torch.equal(loaded(**batch).embeddings, expected)


def test_faults_name_tests_that_exist():
    named = re.findall(r"`(test_\w+\.py)::(test_\w+)`", (ROOT / "docs" / "faults.md").read_text())
    assert len(named) > 50
    missing = [(f, test) for f, test in named if f"\ndef {test}(" not in (ROOT / "tests" / f).read_text()]
    assert missing == []


def test_card_snippets_run(tmp_path, monkeypatch):
    """The usage blocks of a saved model's card, with the folder in the place of its Hub id: what its tags promise."""
    model = tiny_model()
    save_model(model, tmp_path / "model")
    card = base_card(model, repository=str(tmp_path / "model")).content
    (code,) = blocks(card, "python")
    names: dict = {}
    exec(compile(code.replace(":64", ":8"), "card", "exec"), names)
    assert names["embeddings"].shape == (2, 32)
    monkeypatch.chdir(tmp_path)
    for name, wave in zip(("a.wav", "b.wav"), waves(8_000, 6_000), strict=True):
        soundfile.write(name, wave.numpy(), 16_000)
    (code,) = blocks(card, "py")
    exec(compile(code, "card", "exec"), names)
    assert names["answer"]["dim"] == 32 and names["embeddings"].shape == (2, 8)
