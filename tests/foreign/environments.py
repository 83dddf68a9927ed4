"""Environments with nothing but what they are told, made by uv in build/foreign, kept there, and what runs in them."""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "foreign" / "environments"
LOCK = ROOT / "requirements.lock"
SECONDS = 1200  # for one process
LAST_LINES = 3000  # characters of what a process said, where it failed


@dataclass(frozen=True)
class Environment:
    """A virtual environment, and the versions of all packages in it."""

    folder: Path
    installed: dict[str, str]

    def program(self, name: str) -> str:
        return str(self.folder / "bin" / name)

    def run(self, *command: object, folder: Path, fails: bool = False, **variables: str) -> str:
        """What a program of the environment prints when started in `folder`.

        It sees none of this process's Python paths and caches. Without `HF_ENDPOINT` among `variables` nothing answers
        where the Hub would be. fails: it has to end with a status other than 0.
        """
        name, *arguments = map(str, command)
        return printed([self.program(name), *arguments], folder, fails, **variables)


def printed(command: Sequence[str], folder: Path, fails: bool = False, **variables: str) -> str:
    """What a process prints that knows of this machine only its programs; the rest as of `Environment.run`."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "HF_HOME": str(folder / "hf"),
        "HF_ENDPOINT": "http://127.0.0.1:9",  # nobody listens there
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "OMP_NUM_THREADS": "1",
        **variables,
    }
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=SECONDS)
    if (done.returncode != 0) is not fails:
        said = f"{done.stdout[-LAST_LINES:]}\n{done.stderr[-LAST_LINES:]}"
        raise RuntimeError(f"{Path(command[0]).name} ended with the status {done.returncode}:\n{said}")
    return done.stdout


def uv(*arguments: object) -> str:
    """What uv prints; $UV names it."""
    command = [os.environ.get("UV", "uv"), *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"uv {' '.join(command[1:])} failed:\n{done.stderr[-LAST_LINES:]}")
    return done.stdout


def environment(
    name: str, *requirements: str, wheel: Path | None = None, extras: str = "", locked: bool = True
) -> Environment:
    """An environment with these packages and what they need; one that is there already is taken as it is.

    wheel: this package, to be installed as well, with `extras` such as "[serve]"; it is installed anew each time.
    locked: in the versions of requirements.lock, of the packages that it has.
    """
    folder, ready = FOLDER / name, FOLDER / name / "made_of.json"
    constraints = ["--constraint", LOCK] if locked else []
    digest = hashlib.sha256(LOCK.read_bytes()).hexdigest() if locked else ""
    made_of = json.dumps([sys.version, digest, *requirements, extras])
    new = not ready.exists() or ready.read_text() != made_of
    if new:
        uv("venv", "--quiet", "--clear", "--python", sys.executable, folder)
    if wheel is not None:
        requirements = (*requirements, f"mrl-redimnet{extras} @ {wheel.as_uri()}")
    if new or wheel is not None:
        again = ["--reinstall-package", "mrl-redimnet"]
        uv("pip", "install", "--quiet", "--python", folder, *constraints, *again, *requirements)
        ready.write_text(made_of)
    listed = json.loads(uv("pip", "list", "--quiet", "--python", folder, "--format", "json"))
    return Environment(folder, {each["name"]: each["version"] for each in listed})


def build_wheel(folder: Path) -> Path:
    """This checkout as a wheel in `folder`."""
    uv("build", "--quiet", "--python", sys.executable, "--out-dir", folder)  # from its source archive, as `make wheel`
    (wheel,) = folder.glob("*.whl")
    return wheel
