"""The speaker service on Ray Serve, in several copies on one machine or on a cluster (pip install -e .[ray,serve]).

    python examples/serve_with_ray.py nano --store postgresql://USER:PASSWORD@HOST/DATABASE --replicas 4
    python examples/service_client.py http://127.0.0.1:8000 embed a.wav

It is the application of `mrl-redimnet serve`: the same requests, the same client. Each replica holds the model and
all adapters. Ray chooses a replica; the batches are made inside of it, where rows of different adapters share one.
Ray's own `@serve.batch` with `@serve.multiplexed` would split every batch by adapter.

Adapters are given at the start: one that a request loads would be loaded in one of the replicas. Replicas on one
machine may share an SQLite file, those on several need PostgreSQL. /metrics is that of the replica that happens to
answer; Ray's own metrics count all.
"""

import argparse
import os
from collections.abc import Callable

from ray import serve

from mrl_redimnet.encoder import SpeakerEncoder
from mrl_redimnet.serving import POSTGRES, open_store
from mrl_redimnet.serving.app import create_app
from mrl_redimnet.serving.service import Service


def builder(model: str, adapters: dict[str, str], store: str | None) -> Callable:
    """A function that builds the application, in each replica by itself: models and databases do not travel."""

    def build():
        encoder = SpeakerEncoder.from_pretrained(model)
        for name, source in adapters.items():
            encoder.adapters.add(name, source)
        return create_app(Service(encoder, None if store is None else open_store(store)))

    return build


def options_of(replicas: int, most_replicas: int | None, cpus: float, gpus: float) -> dict:
    """Of the deployment: so many replicas, or as many as the requests under way need."""
    if most_replicas is None:
        count = {"num_replicas": replicas}
    else:  # a replica with a round of requests under way and a round that waits is busy
        count = {"autoscaling_config": {"min_replicas": replicas, "max_replicas": most_replicas,
                                        "target_ongoing_requests": 32}}  # fmt: skip
    return {**count, "max_ongoing_requests": 256, "ray_actor_options": {"num_cpus": cpus, "num_gpus": gpus}}


def main(argv: list[str] | None = None, blocking: bool = True):
    """Parses the command line and serves, until Ctrl-C where blocking."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="path, Hub id, or name")
    parser.add_argument("--adapter", action="append", default=[], metavar="NAME=SOURCE")
    parser.add_argument("--store", help="an SQLite file, or postgresql://...")
    parser.add_argument("--replicas", type=int, default=1)
    parser.add_argument("--most-replicas", type=int, metavar="N", help="more start up to N while many requests wait")
    parser.add_argument("--cpus", type=float, default=1, help="of each replica [1]")
    parser.add_argument("--gpus", type=float, default=0, help="of each replica; 0.25: four share one [0]")
    parser.add_argument("--port", type=int, default=8000)
    arguments = parser.parse_args(argv)
    adapters = dict(given.split("=", 1) for given in arguments.adapter)
    if arguments.store is not None and not arguments.store.startswith(POSTGRES):
        arguments.store = os.path.abspath(arguments.store)  # replicas have a working directory of their own
    model = os.path.abspath(arguments.model) if os.path.isdir(arguments.model) else arguments.model
    adapters = {name: os.path.abspath(source) if os.path.isdir(source) else source for name, source in adapters.items()}
    options = options_of(arguments.replicas, arguments.most_replicas, arguments.cpus, arguments.gpus)
    app = serve.deployment(**options)(serve.ingress(builder(model, adapters, arguments.store))()).bind()
    serve.start(http_options={"host": "127.0.0.1", "port": arguments.port})
    serve.run(app, name="speakers", route_prefix="/", blocking=blocking)


if __name__ == "__main__":
    main()
