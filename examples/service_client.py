"""Asks a speaker service, wherever it runs: `mrl-redimnet serve`, its container, or Ray Serve.

    python examples/service_client.py http://127.0.0.1:8000 verify --enrol a.wav b.wav --test unknown.wav
    python examples/service_client.py http://127.0.0.1:8000 enrol anna a.wav b.wav --consent "form 17"
    python examples/service_client.py http://127.0.0.1:8000 identify unknown.wav --adapter auto
    python examples/service_client.py http://127.0.0.1:8000 forget anna

Python's own library is enough for it. It prints the service's answer, JSON; the exit status is 1 for an error. An API
key is read from the environment variable SPEAKER_SERVICE_KEY.
"""

import argparse
import base64
import json
import os
import sys
import urllib.error
import urllib.parse
import urllib.request
from pathlib import Path


class ServiceError(Exception):
    """An answer of the service that is an error. code: a word for programs."""

    def __init__(self, code: str, message: str):
        super().__init__(message)
        self.code = code


class SpeakerService:
    """The service at an address."""

    def __init__(self, address: str, key: str | None = None):
        self.address, self.key = address.rstrip("/"), key

    def ask(self, method: str, path: str, content: dict | None = None) -> dict:
        """The answer to a request; content is sent as JSON. Raises ServiceError, and URLError without an answer."""
        headers = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        data = None
        if content is not None:
            headers["Content-Type"] = "application/json"
            data = json.dumps({name: value for name, value in content.items() if value is not None}).encode()
        request = urllib.request.Request(self.address + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request) as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            said = json.load(error)["error"]
            raise ServiceError(said["code"], said["message"]) from error

    def embed(self, files: list[Path], **values) -> dict:
        """values: adapter, dim."""
        return self.ask("POST", "/embed", {"audio": encoded(files), **values})

    def verify(self, test: Path, enrol: list[Path] | None = None, **values) -> dict:
        """Against the utterances `enrol`, or an enrolled speaker. values: speaker, adapter, dim, threshold."""
        return self.ask("POST", "/verify", {"test": encoded([test]), "enrol": encoded(enrol or []) or None, **values})

    def enrol(self, speaker: str, files: list[Path], **values) -> dict:
        """values: consent, adapter, dim."""
        return self.ask("POST", "/enrol", {"speaker": speaker, "audio": encoded(files), **values})

    def identify(self, test: Path, **values) -> dict:
        """values: top, adapter, dim, threshold."""
        return self.ask("POST", "/identify", {"test": encoded([test]), **values})

    def classify(self, file: Path, **values) -> dict:
        """values: adapter."""
        return self.ask("POST", "/classify", {"audio": encoded([file]), **values})

    def forget(self, speaker: str) -> dict:
        """Deletes a speaker."""
        return self.ask("DELETE", f"/speakers/{urllib.parse.quote(speaker, safe='')}")


def encoded(files: list[Path]) -> list[str]:
    """The files as base64."""
    return [base64.b64encode(Path(file).read_bytes()).decode() for file in files]


def main(argv: list[str] | None = None) -> int:
    """Parses the command line, asks, prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("address", help="such as http://127.0.0.1:8000")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, positional in {
        "embed": {"files": "+"}, "verify": {}, "enrol": {"speaker": None, "files": "+"}, "identify": {"test": None},
        "classify": {"file": None}, "forget": {"speaker": None},
    }.items():  # fmt: skip
        command = commands.add_parser(name)
        for argument, count in positional.items():
            command.add_argument(argument, nargs=count, type=str if argument == "speaker" else Path)
        if name != "forget":
            command.add_argument("--adapter", help="a name, none, or auto")
        if name not in ("forget", "classify"):
            command.add_argument("--dim", type=int)
        if name in ("verify", "identify"):
            command.add_argument("--threshold", type=float)
        if name == "verify":
            command.add_argument("--test", type=Path, required=True)
            command.add_argument("--enrol", type=Path, nargs="+")
            command.add_argument("--speaker")
        if name == "enrol":
            command.add_argument("--consent", help="where the speaker's consent is recorded")
        if name == "identify":
            command.add_argument("--top", type=int)
    values = vars(parser.parse_args(argv))
    service = SpeakerService(values.pop("address"), os.environ.get("SPEAKER_SERVICE_KEY"))
    try:
        answer = getattr(service, values.pop("command"))(**values)
    except (ServiceError, urllib.error.URLError) as error:
        print(f"{getattr(error, 'code', 'no answer')}: {error}", file=sys.stderr)
        return 1
    print(json.dumps(answer, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
