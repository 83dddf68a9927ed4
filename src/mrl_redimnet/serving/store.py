"""Where enrolled speakers are kept: one interface, and SQLite behind it. `postgres.py` has PostgreSQL.

    with SQLiteStore("speakers.db") as store:
        space = Space(encoder.fingerprint, None, 256)
        store.enrol(space, "anna", units, seconds)
        store.nearest(space, unit, 3)                             # [Match("anna", ...), ...]
        store.delete("anna")                                      # in all spaces, and out of the file

An enrolment belongs to a `Space`: the weights that embedded, the adapter, and the dimension. Nothing is ever compared
across spaces. Kept is the sum of a speaker's unit embeddings, no audio.
"""

import sqlite3
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from configuration_mrl_redimnet import MRLReDimNetError

VERSION = 1
NAME_LENGTH = 200


class StoreError(MRLReDimNetError, OSError):
    """The store cannot be opened, read or written."""


class UnknownSpeakerError(MRLReDimNetError, LookupError):
    """Nobody of this name is enrolled where it was looked."""


@dataclass(frozen=True)
class Space:
    """What can be compared with each other.

    Attributes:
        weights: of what embedded, see `SpeakerEncoder.fingerprint`.
        adapter: its name, for people: the weights hold it already.
        dim: how many numbers of the embeddings are kept.
    """

    weights: str
    adapter: str | None
    dim: int

    def __post_init__(self) -> None:
        if not self.weights or self.dim < 1:
            raise ValueError(f"space: got {self}, expected weights and a dimension above 0.")


@dataclass(frozen=True)
class Enrolled:
    """A speaker in a space.

    Attributes:
        utterances, seconds: that were enrolled. consent: where the speaker's consent is recorded, as it was given.
        created, updated: UTC, ISO 8601.
    """

    speaker: str
    space: Space
    utterances: int
    seconds: float
    consent: str | None
    created: str
    updated: str


@dataclass(frozen=True)
class Match:
    """An enrolled speaker and the cosine with the embedding that was looked for."""

    enrolled: Enrolled
    score: float


@dataclass(frozen=True)
class Logged:
    """A decision as it is kept. No audio, no embedding; `speaker` becomes None when that speaker is deleted.

    Attributes:
        kind: "verify" or "identify". speaker: whom the decision is about. threshold, llr, accepted: as of `Decision`.
        service: version of this package.
    """

    kind: str
    speaker: str | None
    space: Space
    score: float
    threshold: float | None
    llr: float | None
    accepted: bool | None
    service: str
    at: str = ""


class SpeakerStore(ABC):
    """Enrolled speakers, and decisions where they are logged. All methods may be called from several threads.

    Every change is on the disk when a method returns: a process that is killed loses nothing of it. All methods raise
    StoreError where the store fails.
    """

    def enrol(self, space: Space, speaker: str, units: NDArray, seconds: float, consent: str | None = None) -> Enrolled:
        """Adds utterances to a speaker, who is made where there is none: unit embeddings [N, dim], their seconds.

        consent: replaces what was said before; None leaves that. Raises ValueError for a name that is empty, longer
        than 200 characters or not printable, and for other shapes or vectors that are not of length 1.
        """
        units = np.asarray(units, dtype=np.float64)
        if not speaker.strip() or len(speaker) > NAME_LENGTH or not speaker.isprintable():
            raise ValueError(f"speaker: got {speaker!r}, expected a name of 1 to {NAME_LENGTH} printable characters.")
        if units.ndim != 2 or not len(units) or units.shape[1] != space.dim:
            raise ValueError(f"embeddings: got shape {units.shape}, expected [utterances, {space.dim}].")
        if not np.allclose(np.linalg.norm(units, axis=1), 1, atol=1e-3):  # NaN is not close to anything
            raise ValueError("embeddings: expected vectors of length 1.")
        return self._enrol(space, speaker, units.sum(0).astype(np.float32), len(units), seconds, consent)

    @abstractmethod
    def _enrol(
        self, space: Space, speaker: str, total: NDArray, utterances: int, seconds: float, consent: str | None
    ) -> Enrolled:
        """As `enrol`, of the sum [dim] of the embeddings."""

    @abstractmethod
    def find(self, space: Space, speaker: str) -> tuple[Enrolled, NDArray]:
        """A speaker and the unit embedding [dim] float64 that is compared. UnknownSpeakerError without one there."""

    @abstractmethod
    def nearest(self, space: Space, unit: NDArray, top: int) -> list[Match]:
        """The `top` speakers of a space that are most alike to a unit embedding [dim], the best one first."""

    @abstractmethod
    def count(self, space: Space) -> int:
        """How many speakers are enrolled in a space."""

    @abstractmethod
    def speakers(self, speaker: str | None = None, *, after: str = "", limit: int = 1000) -> list[Enrolled]:
        """Who is enrolled, in all spaces, by name; of one name alone where it is given.

        after, limit: of more names than that, the next ones are those after the last; a name's spaces stay together.
        """

    @abstractmethod
    def delete(self, speaker: str) -> int:
        """Forgets a speaker in all spaces; returns in how many. Logged decisions lose the name.

        When it returns, nothing of the speaker is left in the store's files. Raises UnknownSpeakerError where there is
        none; StoreError also where the files could not be cleaned, which says what to do.
        """

    @abstractmethod
    def log(self, decision: Logged) -> None:
        """Keeps a decision, with the time."""

    @abstractmethod
    def decisions(self, limit: int = 1000) -> list[Logged]:
        """The latest decisions, the last one first."""

    @abstractmethod
    def close(self) -> None:
        """Ends the connection."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def now() -> str:
    """UTC, ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def unit(total: NDArray) -> NDArray:
    """A sum of embeddings [dim] -> the same of length 1, float64."""
    total = np.asarray(total, dtype=np.float64)
    return total / max(np.linalg.norm(total), np.finfo(np.float64).tiny)


# ---------------------------------------------------------------- SQLite

_TABLES = """
CREATE TABLE IF NOT EXISTS spaces (
    id INTEGER PRIMARY KEY, weights TEXT NOT NULL, adapter TEXT, dim INTEGER NOT NULL, UNIQUE (weights, dim));
CREATE TABLE IF NOT EXISTS enrolled (
    speaker TEXT NOT NULL, space INTEGER NOT NULL REFERENCES spaces, total BLOB NOT NULL, utterances INTEGER NOT NULL,
    seconds REAL NOT NULL, consent TEXT, created TEXT NOT NULL, updated TEXT NOT NULL, PRIMARY KEY (speaker, space));
CREATE INDEX IF NOT EXISTS enrolled_by_space ON enrolled (space);
CREATE TABLE IF NOT EXISTS decisions (
    id INTEGER PRIMARY KEY, kind TEXT NOT NULL, speaker TEXT, space INTEGER NOT NULL REFERENCES spaces,
    score REAL NOT NULL, threshold REAL, llr REAL, accepted INTEGER, service TEXT NOT NULL, at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS decisions_by_speaker ON decisions (speaker);
"""
_ENROLLED = "speaker, weights, adapter, dim, utterances, seconds, consent, created, updated"
_FROM = "enrolled JOIN spaces ON spaces.id = enrolled.space"
_BUSY_SECONDS = 10.0


class SQLiteStore(SpeakerStore):
    """A file, for one machine. Several processes may use it.

    A search compares with all speakers of the space, whose embeddings are then held in memory: 1 KB for each at 256
    dimensions.
    """

    def __init__(self, file: str | Path) -> None:
        """file: is made where there is none; its folder has to be there. Raises StoreError for any other file."""
        self.file = Path(file)
        self._lock = threading.RLock()
        self._held: dict[Space, tuple[int, list[Enrolled], NDArray]] = {}  # with the version of the file it is of
        self._written = 0
        with _explained(f"{self.file} cannot be opened as a store of speakers"):
            self._connection = sqlite3.connect(
                self.file, timeout=_BUSY_SECONDS, isolation_level=None, check_same_thread=False
            )
            try:
                self._prepare()
            except BaseException:
                self._connection.close()
                raise

    def _prepare(self) -> None:
        version = self._row("PRAGMA user_version")[0]
        if version > VERSION or (not version and self._row("SELECT count(*) FROM sqlite_master")[0]):
            raise StoreError(
                f"{self.file} is of a later version of this package, or no store of speakers: update, or give another."
            )
        # FULL: a commit is on the disk before it is answered, also when the power fails. Deleted content is overwritten
        # by zeros, and temporary files of VACUUM are not written.
        for setting in ("journal_mode=WAL", "synchronous=FULL", "secure_delete=ON", "foreign_keys=ON", "temp_store=2"):
            self._connection.execute(f"PRAGMA {setting}").fetchall()
        with self._writing():
            for statement in _TABLES.split(";"):
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA user_version={VERSION}")
        self._connection.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()  # what a killed process left behind

    def _row(self, statement: str, values: Sequence[Any] = ()) -> Any:
        return self._connection.execute(statement, values).fetchone()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        with self._lock, _explained(f"{self.file} cannot be read"):
            yield

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """One transaction, of which everything is kept or nothing."""
        with self._lock, _explained(f"{self.file} cannot be written"):
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                if self._connection.in_transaction:  # a full disk ends it by itself
                    self._connection.execute("ROLLBACK")
                raise
            self._connection.execute("COMMIT")
            self._written += 1

    def _space(self, space: Space, make: bool = False) -> int | None:
        """The row of a space; None where there is none and none is to be made."""
        if make:
            self._connection.execute(
                "INSERT INTO spaces (weights, adapter, dim) VALUES (?, ?, ?) ON CONFLICT DO NOTHING",
                (space.weights, space.adapter, space.dim),
            )
        found = self._row("SELECT id FROM spaces WHERE weights = ? AND dim = ?", (space.weights, space.dim))
        return None if found is None else found[0]

    def _enrol(
        self, space: Space, speaker: str, total: NDArray, utterances: int, seconds: float, consent: str | None
    ) -> Enrolled:
        with self._writing():
            key = (speaker, self._space(space, make=True))
            before = self._row("SELECT total FROM enrolled WHERE speaker = ? AND space = ?", key)
            if before is not None:
                total = np.frombuffer(before[0], np.float32) + total
            self._connection.execute(
                "INSERT INTO enrolled VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?7) ON CONFLICT DO UPDATE SET total = ?3, "
                "utterances = utterances + ?4, seconds = seconds + ?5, consent = coalesce(?6, consent), updated = ?7",
                (*key, total.tobytes(), utterances, seconds, consent, now()),
            )
            return self._enrolled(space, speaker)[0]

    def _enrolled(self, space: Space, speaker: str) -> tuple[Enrolled, NDArray]:
        found = self._row(
            f"SELECT {_ENROLLED}, total FROM {_FROM} WHERE speaker = ? AND weights = ? AND dim = ?",
            (speaker, space.weights, space.dim),
        )
        if found is None:
            raise unknown(speaker, space)
        return enrolled(found), np.frombuffer(found[-1], np.float32)

    def find(self, space: Space, speaker: str) -> tuple[Enrolled, NDArray]:  # noqa: D102 as of the base class
        with self._reading():
            found, total = self._enrolled(space, speaker)
        return found, unit(total)

    def nearest(self, space: Space, unit: NDArray, top: int) -> list[Match]:  # noqa: D102
        people, units = self._matrix(space)
        scores = units @ np.asarray(unit, dtype=np.float32)
        best = np.argsort(-scores, kind="stable")[:top]
        return [Match(people[row], float(scores[row])) for row in best]

    def _matrix(self, space: Space) -> tuple[list[Enrolled], NDArray]:
        """Everybody in a space, and unit embeddings [N, dim] float32: read again when the file has changed."""
        with self._reading():
            # data_version: what others wrote; it does not count what this connection did.
            version = self._row("PRAGMA data_version")[0] + (self._written << 32)
            held = self._held.get(space)
            if held is None or held[0] != version:
                rows = self._connection.execute(
                    f"SELECT {_ENROLLED}, total FROM {_FROM} WHERE weights = ? AND dim = ? ORDER BY speaker",
                    (space.weights, space.dim),
                ).fetchall()
                totals = np.frombuffer(b"".join(row[-1] for row in rows), np.float32).reshape(len(rows), space.dim)
                lengths = np.maximum(np.linalg.norm(totals, axis=1, keepdims=True), np.finfo(np.float32).tiny)
                held = self._held[space] = (version, [enrolled(row) for row in rows], totals / lengths)
            return held[1], held[2]

    def count(self, space: Space) -> int:  # noqa: D102
        with self._reading():
            return self._row("SELECT count(*) FROM enrolled WHERE space = ?", (self._space(space),))[0]

    def speakers(self, speaker: str | None = None, *, after: str = "", limit: int = 1000) -> list[Enrolled]:  # noqa: D102
        with self._reading():
            rows = self._connection.execute(
                f"SELECT {_ENROLLED} FROM {_FROM} WHERE speaker IN (SELECT DISTINCT speaker FROM enrolled WHERE "
                "(?1 IS NULL AND speaker > ?2) OR speaker = ?1 ORDER BY speaker LIMIT ?3) ORDER BY speaker, space",
                (speaker, after, limit),
            )
            return [enrolled(row) for row in rows]

    def delete(self, speaker: str) -> int:  # noqa: D102
        with self._lock:
            with self._writing():
                count = self._connection.execute("DELETE FROM enrolled WHERE speaker = ?", (speaker,)).rowcount
                if not count:
                    raise unknown(speaker)
                self._connection.execute("UPDATE decisions SET speaker = NULL WHERE speaker = ?", (speaker,))
            self._held.clear()
            self._clean(speaker)
        return count

    def _clean(self, speaker: str) -> None:
        """Writes the file anew from what is left, and empties the write-ahead log."""
        try:
            self._connection.execute("VACUUM")
            busy = self._row("PRAGMA wal_checkpoint(TRUNCATE)")[0]
        except sqlite3.Error as error:
            busy, reason = True, str(error)
        else:
            reason = "another process reads it"
        if busy:
            raise StoreError(
                f"{speaker} is deleted, but traces may be left in {self.file} ({reason}). Delete any "
                "speaker, or open the store again, to remove them."
            )

    def log(self, decision: Logged) -> None:  # noqa: D102
        with self._writing():
            self._connection.execute(
                "INSERT INTO decisions (kind, speaker, space, score, threshold, llr, accepted, service, at) "
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
                (decision.kind, decision.speaker, self._space(decision.space, make=True), decision.score,
                 decision.threshold, decision.llr, decision.accepted, decision.service, now()),
            )  # fmt: skip

    def decisions(self, limit: int = 1000) -> list[Logged]:  # noqa: D102
        with self._reading():
            rows = self._connection.execute(
                "SELECT kind, speaker, weights, adapter, dim, score, threshold, llr, accepted, service, at FROM "
                "decisions JOIN spaces ON spaces.id = decisions.space ORDER BY decisions.id DESC LIMIT ?",
                (limit,),
            )
            return [logged(row) for row in rows]

    def close(self) -> None:  # noqa: D102
        with self._lock:
            self._connection.close()


def enrolled(row: Sequence[Any]) -> Enrolled:
    """A speaker from the first columns of a row: speaker, weights, adapter, dim, utterances ..."""
    speaker, weights, adapter, dim, *rest = row[:9]
    return Enrolled(speaker, Space(weights, adapter, dim), *rest)


def logged(row: Sequence[Any]) -> Logged:
    """A decision from a row: kind, speaker, weights, adapter, dim, score ..."""
    kind, speaker, weights, adapter, dim, *rest = row
    found = Logged(kind, speaker, Space(weights, adapter, dim), *rest)
    return replace(found, accepted=None if found.accepted is None else bool(found.accepted))


def unknown(speaker: str, space: Space | None = None) -> UnknownSpeakerError:
    """The error of somebody who is not enrolled, at all or in a space."""
    if space is None:
        return UnknownSpeakerError(f"Nobody is enrolled as {speaker!r}.")
    adapter = f"the adapter {space.adapter}" if space.adapter else "no adapter"
    return UnknownSpeakerError(
        f"Nobody is enrolled as {speaker!r} with {adapter} and {space.dim} dimensions of this model. What was enrolled "
        "with others is never compared: enrol the speaker with these."
    )


@contextmanager
def _explained(what: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        raise StoreError(f"{what}: {error}.") from error
