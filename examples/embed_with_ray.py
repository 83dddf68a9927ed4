"""The embeddings of a corpus as a Ray Data job, on one machine or on a cluster (pip install -e .[ray]).

    python examples/embed_with_ray.py MODEL FOLDER --out FOLDER [--adapter ADAPTER] [--dim 64] [--actors 2] [--gpus 1]

FOLDER may be on a disk that all machines see, or in a store ("s3://bucket/corpus"). Each actor holds the model and
embeds as `mrl-redimnet embed` does: the rows are the same, with a column `problem` more, which says why a row has no
embedding. `ray job submit` runs it on a cluster. Ray starts work again that a lost machine had; a job that was stopped
as a whole starts anew, where the command goes on: prefer the command on one cluster's shared disk.
"""

import argparse
import os

import pyarrow as pa
import ray

from mrl_redimnet.audio.io import Encoded
from mrl_redimnet.data.corpus import AUDIO_SUFFIXES
from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.extraction.bulk import STORAGES, Embedder
from mrl_redimnet.extraction.inputs import Utterance

BATCH = 128  # utterances that are sorted by length together


class Embed:
    """An actor: rows of encoded files (bytes, path) to rows of embeddings."""

    def __init__(self, model: str, adapter: str | None, folder: str, dim: int | None, storage: str):
        self.embedder = Embedder(SpeakerEncoder.from_pretrained(model, adapter), dim, storage)
        self.root = folder.split("://")[-1].rstrip("/") + "/"

    def __call__(self, files: pa.Table) -> pa.Table:
        """id, path, seconds, embedding and problem, in which a row has either of the last two."""
        utterances = [
            Utterance(path.removeprefix(self.root), Encoded(path, data))
            for path, data in zip(files["path"].to_pylist(), files["bytes"].to_pylist(), strict=True)
        ]
        table, problems = self.embedder.table(utterances)
        bad = {
            "id": pa.array([problem.id for problem in problems], pa.string()),
            "path": pa.array([problem.path for problem in problems], pa.string()),
            "problem": pa.array([problem.reason for problem in problems], pa.string()),
        }
        good = table.append_column("problem", pa.nulls(len(table), pa.string()))
        return pa.concat_tables([good, pa.table(bad)], promote_options="default")


def main(argv: list[str] | None = None):
    """Parses the command line, and runs the job to its end."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path or Hub id")
    parser.add_argument("folder", help="with audio at any depth")
    parser.add_argument("--out", required=True, help="folder for parquet files, here or in a store")
    parser.add_argument("--adapter", help="path or Hub id")
    parser.add_argument("--dim", type=int)
    parser.add_argument("--storage", choices=list(STORAGES), default="float32")
    parser.add_argument("--actors", type=int, default=1, help="that hold the model [1]")
    parser.add_argument("--gpus", type=float, default=0, help="of each actor; 0.25: four share one [0]")
    arguments = parser.parse_args(argv)
    for name in ("model", "adapter", "folder", "out"):  # actors have a working directory of their own
        given = getattr(arguments, name)
        if given is not None and "://" not in given and (os.path.exists(given) or name == "out"):
            setattr(arguments, name, os.path.abspath(given))
    files = ray.data.read_binary_files(
        arguments.folder, include_paths=True, file_extensions=[suffix[1:] for suffix in AUDIO_SUFFIXES]
    )
    rows = files.map_batches(
        Embed,
        fn_constructor_args=(
            arguments.model,
            arguments.adapter,
            arguments.folder,
            arguments.dim,
            arguments.storage,
        ),
        batch_size=BATCH,
        batch_format="pyarrow",
        compute=ray.data.ActorPoolStrategy(size=arguments.actors),
        num_gpus=arguments.gpus,
    )
    rows.write_parquet(arguments.out)
    print(f"{arguments.out}: the embeddings of {arguments.folder}")


if __name__ == "__main__":
    main()
