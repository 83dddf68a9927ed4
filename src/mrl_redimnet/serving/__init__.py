"""A speaker service for many callers at once: joint batches, enrolled speakers, HTTP.

`batcher.MicroBatcher` runs single requests in batches; `open_store` opens where enrolled speakers are kept;
`service.Service` answers; `app.create_app` puts HTTP in front of it. `mrl-redimnet serve` starts all of that:
docs/serving.md.
"""

from pathlib import Path

from mrl_redimnet.serving.store import SpeakerStore, SQLiteStore

POSTGRES = ("postgresql://", "postgres://")  # how the address of such a store begins


def open_store(address: str | Path) -> SpeakerStore:
    """The store of an address: the path of an SQLite file, which is made, or `postgresql://...`.

    Raises StoreError where it cannot be opened, ModuleNotFoundError where PostgreSQL's packages are not installed.
    """
    if str(address).startswith(POSTGRES):
        from mrl_redimnet.serving.postgres import PostgresStore  # its packages are an extra of their own

        return PostgresStore(str(address))
    return SQLiteStore(address)
