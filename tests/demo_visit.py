"""A visit to the page of `mrl-redimnet demo` in Chromium: the recordings for it, and what demo_page.js saw."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import soundfile

from mrl_redimnet.recordings import FIRST, OTHER_SPEAKER, SAME_SPEAKER

CHROMIUM = os.environ.get("CHROMIUM", "/usr/bin/chromium")
EXAMPLE = Path(__file__).parents[1] / "examples" / "browser"


def missing() -> str | None:
    """What is not installed that a visit needs; None where all is."""
    if shutil.which("node") is None:
        return "node is not installed"
    if not (EXAMPLE / "node_modules" / "playwright-core").is_dir():
        return "playwright-core is not installed: `make browser`"
    return None if Path(CHROMIUM).exists() else f"there is no {CHROMIUM}: install chromium, or name it in CHROMIUM"


def write_speech(folder: Path) -> None:
    """The packaged recordings as WAV files, whole and in halves, one that is short and quiet, and silence."""
    for name, recording in (("anna_1", FIRST), ("anna_2", SAME_SPEAKER), ("berta_1", OTHER_SPEAKER)):
        samples, rate = soundfile.read(recording, dtype="int16")
        half = len(samples) // 2
        for suffix, part in (("", samples), ("a", samples[:half]), ("b", samples[half:])):
            soundfile.write(folder / f"{name}{suffix}.wav", part, rate)
        if name == "anna_2":
            soundfile.write(folder / "short_and_quiet.wav", samples[rate : 2 * rate] // 64, rate)
            soundfile.write(folder / "silence.wav", 0 * samples, rate)


def visit(address: str, speech: Path, screenshots: Path | None = None) -> dict:
    """What the page at an address showed. speech: the folder of `write_speech`. screenshots: a folder for them."""
    command = ["node", str(Path(__file__).with_name("demo_page.js")), address, str(speech)]
    command += [] if screenshots is None else ["--screenshots", str(screenshots)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout)
