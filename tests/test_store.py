"""Enrolled speakers: kept apart by what embedded them, found again, and gone when they are deleted."""

import multiprocessing
import os
import pwd
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mrl_redimnet.serving import open_store
from mrl_redimnet.serving.store import Logged, Space, StoreError, UnknownSpeakerError

BASE = Space("sha256:one", None, 8)
OTHERS = (Space("sha256:one", None, 4), Space("sha256:two", None, 8), Space("sha256:one+sha256:adapter", "tel", 8))


def units(seed: int, count: int = 1, dim: int = 8) -> np.ndarray:
    found = np.random.default_rng(seed).standard_normal((count, dim))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def server_programs() -> Path | None:
    """Where PostgreSQL's programs are, of an installation that has pgvector; POSTGRES_BIN names another place."""
    places = [Path(os.environ["POSTGRES_BIN"])] if "POSTGRES_BIN" in os.environ else []
    places += sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    for place in places:
        if (place / "initdb").is_file() and (place / "pg_config").is_file():
            shared = subprocess.run([place / "pg_config", "--sharedir"], capture_output=True, text=True, check=True)
            if (Path(shared.stdout.strip()) / "extension" / "vector.control").is_file():
                return place
    return None


@pytest.fixture(scope="session")
def database():
    """The address of a PostgreSQL server of our own, with pgvector."""
    pytest.importorskip("psycopg")
    pytest.importorskip("pgvector")
    programs = server_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server with pgvector here: apt-get install postgresql-16-pgvector, or POSTGRES_BIN")
    user = "nobody" if os.getuid() == 0 else None  # the server refuses to run as root
    folder = Path(tempfile.mkdtemp(prefix="postgres-of-tests-"))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    if user is not None:
        os.chown(folder, pwd.getpwnam(user).pw_uid, -1)
    options = dict(user=user, cwd=folder, check=True, stdout=subprocess.DEVNULL)
    control = [programs / "pg_ctl", "-D", folder / "data", "-w"]
    try:
        subprocess.run([programs / "initdb", "-D", folder / "data", "-U", "tests", "-A", "trust"], **options)
        flags = f"-p {port} -k {folder} -c listen_addresses=127.0.0.1 -c fsync=off"
        subprocess.run([*control, "-o", flags, "-l", folder / "log", "start"], **options)
        try:
            yield f"postgresql://tests@127.0.0.1:{port}/postgres"
        finally:
            subprocess.run([*control, "-m", "immediate", "stop"], **options)
    finally:
        shutil.rmtree(folder)


@pytest.fixture(params=["sqlite", "postgres"])
def address(request, tmp_path):
    """Of an empty store."""
    if request.param == "sqlite":
        return str(tmp_path / "speakers.db")
    found = request.getfixturevalue("database")
    import psycopg

    with psycopg.connect(found, autocommit=True) as connection:
        connection.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    return found


@pytest.fixture
def store(address):
    with open_store(address) as store:
        yield store


def test_speakers_are_found_again(store, address):
    first, more = units(1, 2), units(2, 1)
    made = store.enrol(BASE, "Anna Müller", first, 5.5, "form 17")
    assert (made.utterances, made.seconds, made.consent, made.space) == (2, 5.5, "form 17", BASE)
    again = store.enrol(BASE, "Anna Müller", more, 2.0)
    assert (again.utterances, again.seconds, again.consent, again.created) == (3, 7.5, "form 17", made.created)
    with open_store(address) as other:
        found, unit = other.find(BASE, "Anna Müller")
    assert found == again
    expected = np.concatenate([first, more]).mean(0)
    assert np.allclose(unit, expected / np.linalg.norm(expected), atol=1e-6)


def test_the_nearest_are_found(store):
    everybody = {f"speaker {n}": units(n)[0] for n in range(20)}
    for name, unit in everybody.items():
        store.enrol(BASE, name, unit[None], 3.0)
    wanted = units(100)[0]
    cosines = {name: float(unit @ wanted) for name, unit in everybody.items()}
    best = sorted(cosines, key=cosines.get, reverse=True)[:3]
    for _ in range(2):  # also from what was held in memory
        found = store.nearest(BASE, wanted, 3)
        assert [match.enrolled.speaker for match in found] == best
        assert np.allclose([match.score for match in found], [cosines[name] for name in best], atol=1e-6)
    store.delete(best[0])
    assert [match.enrolled.speaker for match in store.nearest(BASE, wanted, 2)] == best[1:]
    assert len(store.nearest(BASE, wanted, 100)) == store.count(BASE) == 19


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_nothing_is_compared_across_spaces(store, other):
    store.enrol(BASE, "anna", units(1), 3.0)
    store.enrol(other, "bert", units(1, dim=other.dim), 3.0)
    assert [match.enrolled.speaker for match in store.nearest(BASE, units(1)[0], 5)] == ["anna"]
    assert [match.enrolled.speaker for match in store.nearest(other, units(1, dim=other.dim)[0], 5)] == ["bert"]
    with pytest.raises(UnknownSpeakerError, match=r"'anna' with (no adapter|the adapter tel) and \d dimensions"):
        store.find(other, "anna")
    assert store.nearest(Space("sha256:three", None, 8), units(1)[0], 5) == []
    assert store.count(Space("sha256:three", None, 8)) == 0


def test_a_service_sees_what_another_wrote(store, address):
    with open_store(address) as other:
        assert store.nearest(BASE, units(1)[0], 1) == []
        other.enrol(BASE, "anna", units(1), 3.0)
        assert [match.enrolled.speaker for match in store.nearest(BASE, units(1)[0], 1)] == ["anna"]
        other.delete("anna")
        assert store.nearest(BASE, units(1)[0], 1) == []


def test_lists_of_speakers(store):
    for name in ("cora", "anna", "Bert"):
        store.enrol(BASE, name, units(1), 3.0)
    store.enrol(OTHERS[1], "anna", units(1), 3.0)
    assert [each.speaker for each in store.speakers()] == ["Bert", "anna", "anna", "cora"]
    assert [each.speaker for each in store.speakers(limit=2)] == ["Bert", "anna", "anna"]
    assert [each.speaker for each in store.speakers(after="anna")] == ["cora"]
    assert {each.space for each in store.speakers("anna")} == {BASE, OTHERS[1]}
    assert store.speakers("nobody") == []


def test_deletion_is_of_all_spaces_and_of_names_in_the_log(store):
    for space in (BASE, OTHERS[1]):
        store.enrol(space, "anna", units(1), 3.0)
    for name in ("anna", "bert", None):
        store.log(Logged("verify", name, BASE, 0.5, 0.4, None, True, "1.0"))
    assert store.delete("anna") == 2
    assert store.speakers() == []
    assert [each.speaker for each in store.decisions()] == [None, "bert", None]
    with pytest.raises(UnknownSpeakerError, match="Nobody is enrolled as 'anna'."):
        store.delete("anna")


def test_decisions_are_kept(store):
    first = Logged("verify", "anna", BASE, 0.5, 0.4, 1.5, True, "1.0")
    last = Logged("identify", None, OTHERS[2], 0.1, None, None, None, "1.0")
    store.log(first)
    store.log(last)
    found = store.decisions()
    assert [Logged(**{**vars(each), "at": ""}) for each in found] == [last, first]
    assert all(each.at for each in found) and len(store.decisions(limit=1)) == 1


@pytest.mark.parametrize("speaker", ["", "  ", "a" * 201, "a\nb", "a\0b"])
def test_names_that_are_none(store, speaker):
    with pytest.raises(ValueError, match="speaker: got"):
        store.enrol(BASE, speaker, units(1), 3.0)


@pytest.mark.parametrize("wrong", [units(1, dim=4), units(1)[0], 2 * units(1), units(1) * np.nan, units(1)[:0]])
def test_embeddings_that_are_none(store, wrong):
    with pytest.raises(ValueError, match="embeddings: "):
        store.enrol(BASE, "anna", wrong, 3.0)
    assert store.speakers() == []


def test_many_threads_enrol_at_once(store):
    def enrol(number: int):
        for turn in range(5):
            store.enrol(BASE, "shared", units(number), 1.0)
            store.enrol(BASE, f"own {number} {turn}", units(number), 1.0)

    threads = [threading.Thread(target=enrol, args=(number,)) for number in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    found, unit = store.find(BASE, "shared")
    assert found.utterances == 20 and store.count(BASE) == 21
    expected = sum(units(number)[0] for number in range(4))
    assert np.allclose(unit, expected / np.linalg.norm(expected), atol=1e-5)


# ---------------------------------------------------------------- SQLite's file


def contents(file: Path) -> bytes:
    """The file and all beside it."""
    return b"".join(each.read_bytes() for each in file.parent.glob(f"{file.name}*"))


@given(st.lists(st.tuples(st.sampled_from("enrol enrol log delete".split()), st.integers(0, 5)), max_size=25))
def test_nothing_of_a_deleted_speaker_is_left_in_the_file(steps):
    """Neither the name, nor what was said of consent, nor any embedding that was ever kept."""
    with tempfile.TemporaryDirectory() as folder, open_store(Path(folder) / "speakers.db") as store:
        traces: dict[str, list[bytes]] = {}
        for turn, (what, number) in enumerate(steps):
            name = f"speaker-number-{number}"
            if what == "enrol":
                store.enrol(BASE, name, units(1000 * number + turn), 1.0, f"consent of {name}")
                total = store._row("SELECT total FROM enrolled WHERE speaker = ?", (name,))[0]  # noqa: SLF001
                traces.setdefault(name, [name.encode()]).append(total)
            elif what == "log":
                store.log(Logged("verify", name if name in traces else None, BASE, 0.5, 0.4, None, True, "1.0"))
            elif name in traces:
                assert all(trace in contents(store.file) for trace in (traces[name][0], traces[name][-1]))
                store.delete(name)
                assert not any(trace in contents(store.file) for trace in traces.pop(name))
        assert {each.speaker for each in store.speakers()} == set(traces)


KILLED = """
import sys
import numpy as np
from mrl_redimnet.serving import open_store
from mrl_redimnet.serving.store import Space
store = open_store(sys.argv[1])
for number in range(10**6):
    store.enrol(Space("w", None, 4), f"speaker {number}", np.eye(4)[:1], 1.0)
    print(number, flush=True)
"""


@pytest.mark.slow
def test_a_killed_process_loses_nobody(tmp_path):
    """kill -9 in the middle of enrolments: all that were answered are there."""
    file = tmp_path / "speakers.db"
    for _ in range(2):  # the second finds what the first left
        process = subprocess.Popen([sys.executable, "-c", KILLED, file], stdout=subprocess.PIPE, text=True)
        answered = [process.stdout.readline().strip() for _ in range(20)]
        process.send_signal(signal.SIGKILL)
        answered += [line.strip() for line in process.stdout if line.endswith("\n")]
        process.wait()
        with open_store(file) as store:
            there = {each.speaker for each in store.speakers(limit=10**6)}
        assert answered and {f"speaker {number}" for number in answered} <= there
        assert len(there) - len(answered) <= 1 or _ == 1


def _enrol(file: str, number: int):
    with open_store(file) as store:
        for turn in range(10):
            store.enrol(BASE, f"{number}-{turn}", units(number), 1.0)


@pytest.mark.slow
def test_several_processes_write_one_file(tmp_path):
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_enrol, args=(str(tmp_path / "s.db"), number)) for number in range(3)]
    [process.start() for process in processes]
    [process.join() for process in processes]
    assert [process.exitcode for process in processes] == [0, 0, 0]
    with open_store(tmp_path / "s.db") as store:
        assert store.count(BASE) == 30


def test_files_that_are_no_store(tmp_path):
    (tmp_path / "text.db").write_text("this is no database, but long enough to be taken for one " * 20)
    with pytest.raises(StoreError, match="text.db cannot be opened as a store of speakers: file is not a database"):
        open_store(tmp_path / "text.db")
    with pytest.raises(StoreError, match="cannot be opened"):
        open_store(tmp_path / "no folder" / "speakers.db")
    with sqlite3.connect(tmp_path / "other.db") as other:
        other.execute("CREATE TABLE cats (name TEXT)")
    other.close()
    with pytest.raises(StoreError, match="of a later version of this package, or no store of speakers"):
        open_store(tmp_path / "other.db")
    assert sqlite3.connect(tmp_path / "other.db").execute("SELECT name FROM sqlite_master").fetchall() == [("cats",)]


def test_a_database_that_is_not_there():
    pytest.importorskip("psycopg")
    pytest.importorskip("pgvector")
    with pytest.raises(StoreError, match="The database of enrolled speakers failed: "):
        open_store("postgresql://nobody@127.0.0.1:1/nothing")
