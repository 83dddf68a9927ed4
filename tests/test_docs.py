"""The documents: their links lead somewhere, the pages made from the code are of today, and the website builds."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from test_architecture import SOURCES

import mrl_redimnet
import mrl_redimnet.adapters
from mrl_redimnet import MRLReDimNetConfig
from mrl_redimnet.adapters.strategies import STRATEGIES

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md"))]


def prose(page: Path) -> str:
    """A page's text without its blocks of code."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and the website make them."""
    found: set[str] = set()
    for heading in re.findall(r"^#+ (.+)$", prose(page), flags=re.MULTILINE):
        shown = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        anchor = re.sub(r"[^\w\- ]", "", shown.strip().lower()).replace(" ", "-")
        assert anchor not in found, f"{page.name}: the heading {heading!r} comes twice, a link to it is ambiguous"
        found.add(anchor)
    return found


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    wrong = []
    for link in re.findall(r"\]\(([^)\s]+)\)", prose(page)):
        if re.match(r"https?://", link):
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            wrong.append(link)
        elif page.is_relative_to(DOCS) and not target.is_relative_to(DOCS):
            wrong.append(f"{link} (leads out of the website)")
    assert wrong == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_paths_that_are_named_exist(page):
    named = re.findall(r"`((?:src|tests|docs|recipes|adapters|examples|benchmarks|metrics)/[\w./-]*)`", prose(page))
    assert [name for name in named if not (ROOT / name).exists()] == []


def test_tables_of_the_code_that_contributing_names_exist():
    """Where a block, a loss, a domain ... is entered."""
    code = [file.read_text() for file in [*SOURCES.values(), ROOT / "tests" / "conftest.py"]]
    named = set(re.findall(r"`([A-Z][A-Z0-9_]{4,})`", (ROOT / "CONTRIBUTING.md").read_text()))
    missing = {name for name in named if not any(re.search(rf"^{name}\b.*=", text, re.MULTILINE) for text in code)}
    assert len(named) > 10 and missing == set()


def generator():
    """The script docs/generate.py as a module."""
    specification = importlib.util.spec_from_file_location("generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def words(text: str) -> list[str]:
    """Versions of Python break the lines of a help text at other places."""
    return text.split()


def test_generated_pages_are_current():
    old = [name for name, page in generator().GENERATED.items() if words((DOCS / name).read_text()) != words(page())]
    assert old == [], f"run `python docs/generate.py`, which writes {', '.join(old)}"


def test_the_command_line_page_has_every_command():
    page = (DOCS / "cli.md").read_text()
    assert {"## mrl-redimnet verify", "### mrl-redimnet adapters push"} <= set(page.splitlines())


@pytest.mark.parametrize("package", [mrl_redimnet, mrl_redimnet.adapters], ids=lambda package: package.__name__)
def test_public_names_are_on_the_page_of_the_python_reference(package):
    shown = set(re.findall(r"^::: [\w.]+\.(\w+)$", (DOCS / "api.md").read_text(), flags=re.MULTILINE))
    assert set(package.__all__) - shown == set()


def test_every_page_is_in_the_websites_menu():
    menu = re.findall(r": ([\w/]+\.md)$", (ROOT / "mkdocs.yml").read_text(), flags=re.MULTILINE)
    pages = {page.name for page in DOCS.glob("*.md")}
    assert pages <= set(menu)


def test_citation_names_the_papers():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0" and citation["authors"] and citation["message"]
    papers = {each["url"].rsplit("/", 1)[1] for each in citation["references"]}
    assert papers == {"2407.18223", "2603.11841", "2205.13147"}


def test_settings_that_the_pages_on_training_name_exist():
    """Names with an underscore, and `name: value`: settings of a recipe, fields of a configuration, strategies."""
    recipe = set(re.findall(r"^(?:\| `|## )(\w+)", (DOCS / "recipe.md").read_text(), flags=re.MULTILINE))
    known = recipe | set(MRLReDimNetConfig().to_dict()) | set(STRATEGIES)
    text = prose(DOCS / "training.md") + prose(DOCS / "adapters.md").split("## Settings of an adapter")[1]
    named = set(re.findall(r"`(\w+_\w+)`", text)) | set(re.findall(r"`[{]?(\w+): ", text))
    assert len(named) > 10 and named - known == set()


@pytest.mark.slow
def test_the_website_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(tmp_path / "site")]
    built = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert (tmp_path / "site" / "api" / "index.html").is_file()
