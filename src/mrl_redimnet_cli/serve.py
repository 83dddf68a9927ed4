"""`mrl-redimnet serve`: a speaker service over HTTP."""

import argparse
from pathlib import Path

from mrl_redimnet_cli.arguments import (
    MODEL,
    Commands,
    add_command,
    add_named_adapters,
    add_thresholds,
    file,
    folder,
    model_source,
    must_be_there,
    named_adapters,
)
from mrl_redimnet_cli.names import VALUES

LOOPBACK = ("127.0.0.1", "localhost", "::1")


def add(commands: Commands) -> None:
    """Adds the command to the subparsers `commands`."""
    parser = add_command(
        commands,
        "serve",
        run,
        help="a speaker service over HTTP",
        epilog="SIGTERM or Ctrl-C ends it when all requests that were taken are answered. See docs/serving.md.",
    )
    parser.add_argument("model", help=f"the model: {MODEL}")
    add_named_adapters(parser, "that requests call it")
    parser.add_argument(
        "--allow-namespace",
        action="append",
        default=[],
        metavar="OWNER",
        help="an owner on the Hub whose adapters requests may load; may be given several times [none]",
    )
    parser.add_argument(
        "--detector", type=Path, metavar="FOLDER", help="a saved domain detector, which chooses for `adapter=auto`"
    )
    add_thresholds(parser)
    parser.add_argument(
        "--store",
        metavar="STORE",
        help="where enrolled speakers are kept: an SQLite file, which is made, or postgresql://... [nowhere]",
    )
    parser.add_argument("--log-decisions", action="store_true", help="keep every decision in the store, without audio")
    parser.add_argument(
        "--require-consent", action="store_true", help="refuse enrolments that do not say where consent is recorded"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at [127.0.0.1: this machine alone]")
    parser.add_argument("--port", type=int, default=8000, help="0: any that is free [8000]")
    parser.add_argument("--keys", type=Path, metavar="FILE", help="API keys, one a line [none: everybody may ask]")
    parser.add_argument("--device", help="such as cuda:1 [an accelerator where there is one]")
    for name, unit, text in (
        ("wait-ms", "MS", "how long an idle network waits for more requests, at most"),
        ("batch-seconds", "S", "padded speech in a batch"),
        ("queue-seconds", "S", "speech that may wait, beyond which requests are refused"),
    ):
        default = VALUES[f"serving.batcher.{name.replace('-', '_').upper()}"]
        parser.add_argument(f"--{name}", type=float, default=default, metavar=unit, help=f"{text} [{default:g}]")
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="passes over the network at once [on a CPU one for each of torch's threads, four at most; else 1]",
    )
    add_limits(parser)
    must_be_there(parser, model=model_source, detector=folder, keys=file)


def add_limits(parser: argparse.ArgumentParser) -> None:
    """What requests may ask for at most, and enrolments need at least."""
    limits = parser.add_argument_group("limits")
    limits.add_argument("--max-megabytes", type=float, default=32, metavar="MB", help="of a request's body [32]")
    limits.add_argument("--max-seconds", type=float, default=120, metavar="S", help="of one utterance [120]")
    limits.add_argument("--max-utterances", type=int, default=20, metavar="N", help="in one request [20]")
    limits.add_argument("--max-requests", type=int, default=256, metavar="N", help="at once [256]")
    limits.add_argument("--max-adapters", type=int, default=32, metavar="N", help="loaded at once [32]")
    limits.add_argument(
        "--enrol-seconds",
        type=float,
        default=VALUES["scoring.decisions.ENROL_SECONDS"],
        metavar="S",
        help=f"of speech to enrol from, at least [{VALUES['scoring.decisions.ENROL_SECONDS']:g}]",
    )


def run(arguments: argparse.Namespace) -> None:
    """Answers requests until it is told to stop."""
    import warnings

    from mrl_redimnet import SpeakerEncoder
    from mrl_redimnet.adapters.detector import DomainDetector
    from mrl_redimnet.audio.io import AudioWarning
    from mrl_redimnet.extras import extra
    from mrl_redimnet.scoring.calibration import Thresholds
    from mrl_redimnet.serving import open_store
    from mrl_redimnet.serving.app import Keys, create_app
    from mrl_redimnet.serving.batcher import MicroBatcher
    from mrl_redimnet.serving.service import MEGABYTE, Limits, Service

    with extra("serve"):
        import uvicorn

    warnings.simplefilter("ignore", AudioWarning)  # Python would keep the text of each, for as long as it runs
    limits = Limits(
        bytes=round(arguments.max_megabytes * MEGABYTE),
        seconds=arguments.max_seconds,
        utterances=arguments.max_utterances,
        requests=arguments.max_requests,
        enrol_seconds=arguments.enrol_seconds,
        adapters=arguments.max_adapters,
    )
    keys = None if arguments.keys is None else Keys.load(arguments.keys)
    detector = None if arguments.detector is None else DomainDetector.load(arguments.detector)
    thresholds = None if arguments.thresholds is None else Thresholds.load(arguments.thresholds)
    encoder = SpeakerEncoder.from_pretrained(arguments.model, device=arguments.device)
    for name, where in named_adapters(arguments).items():
        encoder.adapters.add(name, where)
    store = None if arguments.store is None else open_store(arguments.store)
    batcher = MicroBatcher(
        encoder,
        wait_ms=arguments.wait_ms,
        batch_seconds=arguments.batch_seconds,
        queue_seconds=arguments.queue_seconds,
        workers=arguments.workers,
    )
    service = Service(
        encoder,
        store,
        batcher=batcher,
        detector=detector,
        thresholds=thresholds,
        namespaces=arguments.allow_namespace,
        limits=limits,
        log_decisions=arguments.log_decisions,
        require_consent=arguments.require_consent,
    )
    here = arguments.host in LOOPBACK
    app = create_app(service, keys, hosts=LOOPBACK if here and keys is None else None)
    if not here and keys is None:
        print(f"Note: everybody who reaches {arguments.host} may use this service: give --keys.", flush=True)
    # No access log: addresses hold names of speakers.
    uvicorn.run(app, host=arguments.host, port=arguments.port, access_log=False, log_level="info")
