"""Takes the pictures of docs/demo.md anew: `python docs/screenshots.py`, with Chromium and after `make browser`."""

import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from demo_visit import missing, visit, write_speech  # noqa: E402

from mrl_redimnet.demo.listener import Listener  # noqa: E402
from mrl_redimnet.demo.page import opened  # noqa: E402

FOLDER = ROOT / "docs" / "demo"


def main() -> None:
    """Takes the pictures."""
    if problem := missing():
        raise SystemExit(problem)
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as taken, opened(Listener.load("nano")) as address:
        speech = Path(taken) / "speech"
        speech.mkdir()
        write_speech(speech)
        visit(address, speech, Path(taken))
        for file in sorted(Path(taken).glob("*.png")):
            with Image.open(file) as picture:  # 256 colours are enough, and half of the bytes
                colours = Image.Quantize.MAXCOVERAGE  # few pixels of green and red are what matters
                few = picture.convert("RGB").quantize(256, colours, dither=Image.Dither.NONE)
                few.save(FOLDER / file.name, optimize=True)
            print(f"{file.name}: {(FOLDER / file.name).stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
