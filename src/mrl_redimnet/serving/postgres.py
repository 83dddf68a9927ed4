"""Enrolled speakers in PostgreSQL with its extension pgvector, which services on several machines share."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mrl_redimnet.extras import extra
from mrl_redimnet.serving.store import (
    Enrolled,
    Logged,
    Match,
    Space,
    SpeakerStore,
    StoreError,
    enrolled,
    logged,
    now,
    unit,
    unknown,
)

with extra("postgres"):
    import psycopg
    from pgvector import Vector
    from pgvector.psycopg import register_vector

# Two services that start together would both make the tables.
_LOCK = "SELECT pg_advisory_xact_lock(7214402801)"
_TABLES = """
CREATE EXTENSION IF NOT EXISTS vector;
CREATE TABLE IF NOT EXISTS mrl_redimnet_spaces (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, weights TEXT NOT NULL, adapter TEXT, dim INTEGER NOT NULL,
    UNIQUE (weights, dim));
CREATE TABLE IF NOT EXISTS mrl_redimnet_enrolled (
    speaker TEXT COLLATE "C" NOT NULL, space BIGINT NOT NULL REFERENCES mrl_redimnet_spaces, total VECTOR NOT NULL,
    utterances INTEGER NOT NULL, seconds DOUBLE PRECISION NOT NULL, consent TEXT, created TEXT NOT NULL,
    updated TEXT NOT NULL, PRIMARY KEY (speaker, space));
CREATE INDEX IF NOT EXISTS mrl_redimnet_enrolled_by_space ON mrl_redimnet_enrolled (space);
CREATE TABLE IF NOT EXISTS mrl_redimnet_decisions (
    id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, kind TEXT NOT NULL, speaker TEXT,
    space BIGINT NOT NULL REFERENCES mrl_redimnet_spaces, score DOUBLE PRECISION NOT NULL,
    threshold DOUBLE PRECISION, llr DOUBLE PRECISION, accepted BOOLEAN, service TEXT NOT NULL, at TEXT NOT NULL);
CREATE INDEX IF NOT EXISTS mrl_redimnet_decisions_by_speaker ON mrl_redimnet_decisions (speaker);
"""
_ENROLLED = "speaker, weights, adapter, dim, utterances, seconds, consent, created, updated"
_FROM = "mrl_redimnet_enrolled e JOIN mrl_redimnet_spaces s ON s.id = e.space"


class PostgresStore(SpeakerStore):
    """A database, for services on several machines. The search runs in the database and compares with all speakers of
    the space; docs/serving.md says how to give it an index.

    A connection that broke is opened again at the next call.
    """

    def __init__(self, address: str) -> None:
        """address: postgresql://USER:PASSWORD@HOST/DATABASE. Tables are made where they are not there.

        Raises StoreError where the database cannot be reached, or lacks pgvector.
        """
        self._address = address
        self._lock = threading.RLock()
        self._open: psycopg.Connection | None = None
        with self._transaction() as connection:
            connection.execute("SELECT 1")

    def _connected(self) -> "psycopg.Connection[Any]":
        if self._open is None or self._open.closed:
            connection = psycopg.connect(self._address, autocommit=True)
            try:
                with connection.transaction():
                    connection.execute(_LOCK)
                    connection.execute(_TABLES)
                register_vector(connection)
            except BaseException:
                connection.close()
                raise
            self._open = connection
        return self._open

    @contextmanager
    def _transaction(self) -> Iterator["psycopg.Connection[Any]"]:
        """One transaction, of which everything is kept or nothing."""
        with self._lock:
            try:
                connection = self._connected()
                with connection.transaction():
                    yield connection
            except psycopg.Error as error:
                reason = str(error).strip().splitlines()[0]
                raise StoreError(f"The database of enrolled speakers failed: {reason}.") from error

    def _space(self, connection: "psycopg.Connection[Any]", space: Space) -> int:
        key = (space.weights, space.dim)
        connection.execute(
            "INSERT INTO mrl_redimnet_spaces (weights, adapter, dim) VALUES (%s, %s, %s) ON CONFLICT DO NOTHING",
            (space.weights, space.adapter, space.dim),
        )
        row = connection.execute("SELECT id FROM mrl_redimnet_spaces WHERE weights = %s AND dim = %s", key).fetchone()
        if row is None:
            raise StoreError("The database of enrolled speakers failed: a row that was written is not there.")
        return row[0]

    def _enrol(
        self, space: Space, speaker: str, total: NDArray, utterances: int, seconds: float, consent: str | None
    ) -> Enrolled:
        with self._transaction() as connection:
            at = now()
            connection.execute(
                "INSERT INTO mrl_redimnet_enrolled AS e VALUES (%s, %s, %s, %s, %s, %s, %s, %s) "
                "ON CONFLICT (speaker, space) DO UPDATE SET total = e.total + excluded.total, "
                "utterances = e.utterances + excluded.utterances, seconds = e.seconds + excluded.seconds, "
                "consent = coalesce(excluded.consent, e.consent), updated = excluded.updated",
                (speaker, self._space(connection, space), Vector(total), utterances, seconds, consent, at, at),
            )
            return self._enrolled(connection, space, speaker)[0]

    def _enrolled(self, connection: "psycopg.Connection[Any]", space: Space, speaker: str) -> tuple[Enrolled, NDArray]:
        row = connection.execute(
            f"SELECT {_ENROLLED}, total FROM {_FROM} WHERE speaker = %s AND weights = %s AND dim = %s",
            (speaker, space.weights, space.dim),
        ).fetchone()
        if row is None:
            raise unknown(speaker, space)
        return enrolled(row), as_array(row[-1])

    def find(self, space: Space, speaker: str) -> tuple[Enrolled, NDArray]:  # noqa: D102 as of the base class
        with self._transaction() as connection:
            found, total = self._enrolled(connection, space, speaker)
        return found, unit(total)

    def nearest(self, space: Space, unit: NDArray, top: int) -> list[Match]:  # noqa: D102
        # <=> is one minus the cosine, so the length of a sum does not matter.
        with self._transaction() as connection:
            wanted = Vector(np.asarray(unit, dtype=np.float32))
            rows = connection.execute(
                f"SELECT {_ENROLLED}, 1 - (total <=> %s) FROM {_FROM} WHERE weights = %s AND dim = %s "
                "ORDER BY total <=> %s, speaker LIMIT %s",
                (wanted, space.weights, space.dim, wanted, top),
            ).fetchall()
        return [Match(enrolled(row), float(row[-1])) for row in rows]

    def count(self, space: Space) -> int:  # noqa: D102
        with self._transaction() as connection:
            row = connection.execute(
                f"SELECT count(*) FROM {_FROM} WHERE weights = %s AND dim = %s", (space.weights, space.dim)
            ).fetchone()
        return 0 if row is None else row[0]

    def speakers(self, speaker: str | None = None, *, after: str = "", limit: int = 1000) -> list[Enrolled]:  # noqa: D102
        chosen, values = ("speaker = %s", speaker) if speaker is not None else ("speaker > %s", after)
        with self._transaction() as connection:
            rows = connection.execute(
                f"SELECT {_ENROLLED} FROM {_FROM} WHERE speaker IN (SELECT DISTINCT speaker FROM mrl_redimnet_enrolled "
                f"WHERE {chosen} ORDER BY speaker LIMIT %s) ORDER BY speaker, space",
                (values, limit),
            ).fetchall()
        return [enrolled(row) for row in rows]

    def delete(self, speaker: str) -> int:
        """As of the base class, out of the tables' files. The write-ahead log and backups of the server keep traces
        until they are overwritten or removed: docs/serving.md.
        """
        with self._transaction() as connection:
            count = connection.execute("DELETE FROM mrl_redimnet_enrolled WHERE speaker = %s", (speaker,)).rowcount
            if not count:
                raise unknown(speaker)
            connection.execute("UPDATE mrl_redimnet_decisions SET speaker = NULL WHERE speaker = %s", (speaker,))
        with self._lock:
            try:  # outside of a transaction, as VACUUM must be
                self._connected().execute("VACUUM FULL mrl_redimnet_enrolled")
                self._connected().execute("VACUUM FULL mrl_redimnet_decisions")
            except psycopg.Error as error:
                raise StoreError(
                    f"{speaker} is deleted, but traces are left in the tables' files ({str(error).strip()}). "
                    "VACUUM FULL of the tables mrl_redimnet_enrolled and mrl_redimnet_decisions removes them."
                ) from error
        return count

    def log(self, decision: Logged) -> None:  # noqa: D102
        with self._transaction() as connection:
            connection.execute(
                "INSERT INTO mrl_redimnet_decisions (kind, speaker, space, score, threshold, llr, accepted, service, "
                "at) VALUES (%s, %s, %s, %s, %s, %s, %s, %s, %s)",
                (decision.kind, decision.speaker, self._space(connection, decision.space), decision.score,
                 decision.threshold, decision.llr, decision.accepted, decision.service, now()),
            )  # fmt: skip

    def decisions(self, limit: int = 1000) -> list[Logged]:  # noqa: D102
        with self._transaction() as connection:
            rows = connection.execute(
                "SELECT kind, speaker, weights, adapter, dim, score, threshold, llr, accepted, service, at FROM "
                "mrl_redimnet_decisions d JOIN mrl_redimnet_spaces s ON s.id = d.space ORDER BY d.id DESC LIMIT %s",
                (limit,),
            ).fetchall()
        return [logged(row) for row in rows]

    def close(self) -> None:  # noqa: D102
        with self._lock:
            if self._open is not None:
                self._open.close()


def as_array(vector: Any) -> NDArray:
    """A vector of the database as an array: what pgvector gives depends on its version."""
    return np.asarray(vector.to_numpy() if isinstance(vector, Vector) else vector, dtype=np.float32)
