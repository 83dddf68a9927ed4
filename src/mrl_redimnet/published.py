"""The checkpoints that the authors of ReDimNet and ReDimNet2 publish, by name, and the fetching of their files.

The list is `published.json`: the authors' release addresses, what each checkpoint was trained on, what is said of its
licence, and size and SHA-256 where somebody states them.

A file is fetched once, into huggingface_hub's cache for files of other libraries, `HF_ASSETS_CACHE`, which is
`HF_HOME/assets` by default. `HF_HUB_OFFLINE=1` forbids the fetching; `MRL_REDIMNET_MIRROR` is an address to use in the
place of https://github.com.

The requests, their offline mode and their proxies are huggingface_hub's. Its own `hf_hub_download` fetches from a Hub
alone; of the libraries that fetch a plain address, pooch, torch.hub and fsspec do not resume a broken download. So the
resuming is written here.
"""

import difflib
import errno
import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import cached_assets_path, constants, get_session
from huggingface_hub.errors import (
    HTTPError,  # of the HTTP library that huggingface_hub uses, whichever that is
    OfflineModeIsEnabled,
)
from huggingface_hub.utils import WeakFileLock
from tqdm import tqdm

from configuration_mrl_redimnet import MRLReDimNetError

HOST = "https://github.com"
ATTEMPTS = 3  # in a row that bring nothing, before a connection that breaks again and again is given up
PAUSE = 1.0  # seconds between them


class FetchError(MRLReDimNetError, OSError):
    """A published checkpoint cannot be fetched. The message says why, and how to get it by hand."""


@dataclass(frozen=True)
class Checkpoint:
    """A published checkpoint.

    Attributes:
        owner, name: as of `PUBLISHED`.
        network: "ReDimNet" or "ReDimNet2".
        repository: address of the authors' repository. address: of their release, where the file lies.
        corpora: what it was trained on.
        licence: of the weights, as the Hub's identifier; None where it is not stated. terms: what is said of it.
        size, sha256: of the file, in bytes and in hexadecimal digits; None where nobody states them.
    """

    owner: str
    name: str
    network: str
    repository: str
    address: str
    corpora: tuple[str, ...]
    licence: str | None
    terms: str
    size: int | None = None
    sha256: str | None = None

    @property
    def id(self) -> str:
        """OWNER/NAME."""
        return f"{self.owner}/{self.name}"

    @property
    def file(self) -> str:
        """The name of its file."""
        return f"{self.name}.pt"

    @property
    def url(self) -> str:
        """The address of its file, at the mirror where one is set."""
        mirror = os.environ.get("MRL_REDIMNET_MIRROR", HOST).rstrip("/")
        return f"{mirror}{self.address.removeprefix(HOST)}{self.file}"

    @property
    def by_hand(self) -> str:
        """How to do without fetching, as the end of a message."""
        return f"download {self.file} from {self.url} and run `mrl-redimnet convert {self.file} OUT`."

    @property
    def origin(self) -> str:
        """Where the weights are from, as a sentence for a model card."""
        return (
            f"Converted from the published {self.network} checkpoint [{self.file}]({self.address}{self.file}), trained "
            f"by the [authors]({self.repository}) of the network. {self.terms}"
        )

    def cache(self) -> Path:
        """The folder of the cache for this checkpoint, which is made if need be. FetchError where it cannot be."""
        try:
            return cached_assets_path("mrl-redimnet", namespace=self.owner, subfolder=self.name)
        except (OSError, ValueError) as error:  # ValueError: huggingface_hub's, for a file in the place of a folder
            raise _unwritable(self, error) from error


def _read_list() -> Iterator[Checkpoint]:
    content = json.loads(Path(__file__).with_name("published.json").read_text(encoding="utf-8"))
    for owner, release in content["releases"].items():
        for name, file in release["checkpoints"].items():
            data = release["data"][name.split("-")[1]]  # SIZE-DATA-STAGE
            yield Checkpoint(
                owner,
                name,
                release["network"],
                release["repository"],
                release["address"],
                tuple(data["corpora"]),
                data["licence"],
                data["terms"],
                file["size"],
                file["sha256"],
            )


# By OWNER/NAME.
PUBLISHED = {checkpoint.id: checkpoint for checkpoint in _read_list()}


def find_checkpoint(name: str) -> Checkpoint | None:
    """The published checkpoint called OWNER/NAME, or NAME where one owner alone has it; None where there is none.

    Raises ValueError for a NAME that both owners have.
    """
    found = [checkpoint for checkpoint in PUBLISHED.values() if name in (checkpoint.id, checkpoint.name)]
    if len(found) > 1:
        ids = " or ".join(f"{checkpoint.id} ({checkpoint.network})" for checkpoint in found)
        raise ValueError(f"{name} is the name of several published checkpoints: give {ids}.")
    return found[0] if found else None


def nearest_names(name: str, others: Iterable[str] = ()) -> list[str]:
    """Names of published checkpoints, and `others`, that `name` may be a misspelling of: the three nearest at most.

    None for OWNER/NAME of another owner, which is a Hub id.
    """
    owner, slash, _ = name.rpartition("/")
    if slash and owner.casefold() not in {checkpoint.owner.casefold() for checkpoint in PUBLISHED.values()}:
        return []
    known = [checkpoint.id if slash else checkpoint.name for checkpoint in PUBLISHED.values()]
    return difflib.get_close_matches(name, [*dict.fromkeys(known), *others], cutoff=0.75)


def fetch(checkpoint: Checkpoint) -> Path:
    """The file of a published checkpoint in the cache, fetched where it is not there yet.

    What a broken connection has brought stays in the cache, and the next call goes on behind it, where the server
    says by an ETag that its file is still the same. The file gets its name when it is whole and has the size and the
    hash of the list; until then it is no `.pt` file. Processes that ask for one file at once fetch it once.

    Raises FetchError, see there.
    """
    folder = checkpoint.cache()
    file = folder / checkpoint.file
    if file.is_file():
        return file
    with writing_to_cache(checkpoint), WeakFileLock(folder / "fetching.lock"):
        if not file.is_file():
            partial = folder / f"{checkpoint.file}.part"
            _download(checkpoint, partial)
            if problem := _difference(checkpoint, partial):
                raise refused(checkpoint, partial, problem)
            os.replace(partial, file)
    return file


def refused(checkpoint: Checkpoint, file: Path, problem: str) -> FetchError:
    """The error for a fetched file that is not what it should be; it is set aside, so that nothing takes it by its
    name. problem: what is wrong, as the part of a sentence.
    """
    aside = file.with_name(f"{checkpoint.file}.refused")
    os.replace(file, aside)
    return FetchError(
        f"What {checkpoint.url} gave is not used: {problem}. The authors may have replaced the file, or something else "
        f"has answered for them. It is kept as {aside}; if it is right after all, run "
        f"`mrl-redimnet convert {aside} OUT`, or {checkpoint.by_hand}"
    )


@contextmanager
def writing_to_cache(checkpoint: Checkpoint) -> Iterator[None]:
    """Around what writes to the cache: what the system has against it becomes a FetchError."""
    try:
        yield
    except MRLReDimNetError:
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise _disk_full(checkpoint) from error
        raise _unwritable(checkpoint, error) from error


def _unwritable(checkpoint: Checkpoint, error: Exception) -> FetchError:
    return FetchError(
        f"{checkpoint.id} cannot be kept in the cache ({error}). Set HF_HOME to a folder that can be written, or "
        f"{checkpoint.by_hand}"
    )


def _disk_full(checkpoint: Checkpoint) -> FetchError:
    return FetchError(
        f"{checkpoint.id} cannot be kept: the disk of {checkpoint.cache()} is full. Make room, and the next call goes "
        f"on with what is there; or set HF_HOME to a folder on another disk; or {checkpoint.by_hand}"
    )


def _download(checkpoint: Checkpoint, partial: Path) -> None:
    """Fetches until `partial` is whole; a connection that breaks is taken up again as long as it brings something."""
    fruitless = 0
    while True:
        before = _size(partial)
        try:
            return _receive(checkpoint, partial)
        except OfflineModeIsEnabled as error:
            raise FetchError(
                f"{checkpoint.id} is not in the cache, and HF_HUB_OFFLINE forbids to fetch it: unset it, or "
                f"{checkpoint.by_hand}"
            ) from error
        except HTTPError as error:
            why = f"{type(error).__name__}: {error}".rstrip(": .")
            fruitless = 0 if _size(partial) > before else fruitless + 1
            if not _size(partial):
                raise FetchError(
                    f"{checkpoint.id} cannot be fetched: no connection to {checkpoint.url} ({why}). Check the network "
                    f"and the proxy, or {checkpoint.by_hand}"
                ) from error
            if fruitless == ATTEMPTS:
                raise FetchError(
                    f"{checkpoint.id} cannot be fetched: the connection to {checkpoint.url} broke after "
                    f"{_size(partial):,} bytes ({why}). Call again, and it goes on from there, or {checkpoint.by_hand}"
                ) from error
            time.sleep(PAUSE)


def _receive(checkpoint: Checkpoint, partial: Path) -> None:
    """One request: what `partial` lacks, or all where the server does not say that its file is the same as before."""
    etag = partial.with_suffix(".etag")
    resume = _size(partial) > 0 and etag.is_file()
    headers = {"Accept-Encoding": "identity"}  # compressed bytes could not be counted
    if resume:
        headers |= {"Range": f"bytes={_size(partial)}-", "If-Range": etag.read_text()}
    # Without a timeout of its own the session waits for ever.
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream("GET", checkpoint.url, headers=headers, timeout=timeout, follow_redirects=True) as answer:
        begins = _size(partial) if resume and answer.status_code == 206 else 0
        goes_on = begins and answer.headers.get("Content-Range", "").startswith(f"bytes {begins}-")
        if resume and not goes_on and answer.status_code in (206, 416):
            etag.unlink()  # the server has no more of the file, or sent another part of it: from the start, then
            return _receive(checkpoint, partial)
        if not goes_on and answer.status_code != 200:
            raise _bad_answer(checkpoint, answer.status_code)
        length = answer.headers.get("Content-Length")
        missing = int(length) if length and length.isdecimal() else None
        if missing is not None and shutil.disk_usage(partial.parent).free < missing:
            raise _disk_full(checkpoint)
        validator = answer.headers.get("ETag", "")
        if validator.startswith('"'):  # weak ones, W/"...", do not promise the same bytes
            etag.write_text(validator)
        else:
            etag.unlink(missing_ok=True)
        with (
            open(partial, "ab" if begins else "wb") as file,
            tqdm(
                desc=checkpoint.file,
                total=None if missing is None else begins + missing,
                initial=begins,
                unit="B",
                unit_scale=True,
                disable=None,  # shown where it is a terminal
            ) as bar,
        ):
            for chunk in answer.iter_bytes():  # of no set size: what came before a break is not to be lost
                file.write(chunk)
                bar.update(len(chunk))
    etag.unlink(missing_ok=True)


def _bad_answer(checkpoint: Checkpoint, status: int) -> FetchError:
    if status in (404, 410):
        return FetchError(
            f"{checkpoint.id} cannot be fetched: there is nothing at {checkpoint.url} (status {status}). The authors "
            f"may have moved or renamed it: look for {checkpoint.file} at {checkpoint.repository}, download it, and "
            f"run `mrl-redimnet convert {checkpoint.file} OUT`."
        )
    return FetchError(
        f"{checkpoint.id} cannot be fetched: {checkpoint.url} is answered with status {status}. Try again later, or "
        f"{checkpoint.by_hand}"
    )


def _difference(checkpoint: Checkpoint, file: Path) -> str | None:
    """What the list says otherwise of the file; None for nothing."""
    if checkpoint.size is not None and _size(file) != checkpoint.size:
        return f"it has {_size(file):,} bytes, expected {checkpoint.size:,}"
    if checkpoint.sha256 is not None:
        with open(file, "rb") as opened:
            found = hashlib.file_digest(opened, "sha256").hexdigest()
        if found != checkpoint.sha256:
            return f"its SHA-256 is {found}, expected {checkpoint.sha256}"
    return None


def _size(file: Path) -> int:
    return file.stat().st_size if file.is_file() else 0
