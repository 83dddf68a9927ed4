"""The speaker service over real HTTP: what it answers, what it refuses, and how it stops."""

import base64
import http.client
import io
import json
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import soundfile
from commands import refusal
from conftest import tiny_config, tiny_model
from local_hub import ANNA
from test_bank import save_adapter

from modeling_mrl_redimnet import MRLReDimNetForSequenceClassification
from mrl_redimnet import SpeakerEncoder
from mrl_redimnet.adapters import AdapterFacts, Base, fingerprint, lora_config
from mrl_redimnet.adapters.detector import DomainDetector
from mrl_redimnet.adapters.hub import push_adapter
from mrl_redimnet.saving import save_model
from mrl_redimnet.scoring.calibration import Threshold, Thresholds

fastapi = pytest.importorskip("fastapi")
uvicorn = pytest.importorskip("uvicorn")

from mrl_redimnet.serving import open_store  # noqa: E402
from mrl_redimnet.serving.app import Keys, create_app  # noqa: E402 after the check that its packages are there
from mrl_redimnet.serving.batcher import MicroBatcher  # noqa: E402
from mrl_redimnet.serving.service import Limits, Service  # noqa: E402

RATE = 16_000
BOUNDARY = "a-boundary"


def voice(seed: int, seconds: float = 2.5, rate: int = RATE, format: str = "WAV", pause: float = 0.0) -> bytes:
    """A file with noise of one colour, and a pause behind it."""
    rng = np.random.default_rng(seed)
    tone = 0.2 * np.sin(2 * np.pi * (200 + 300 * (seed % 10)) * np.arange(round(seconds * rate)) / rate)
    file = io.BytesIO()
    sound = np.concatenate([0.05 * rng.standard_normal(len(tone)) + tone, np.zeros(round(pause * rate))])
    soundfile.write(file, sound, rate, format=format)
    return file.getvalue()


def form(*fields: tuple[str, bytes | str]) -> tuple[bytes, dict]:
    """A form with files (bytes) and values, and its header."""
    parts = []
    for name, value in fields:
        file = '; filename="a"' if isinstance(value, bytes) else ""
        head = f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"{file}\r\n\r\n'
        parts += [head.encode(), value if isinstance(value, bytes) else value.encode(), b"\r\n"]
    return b"".join([*parts, f"--{BOUNDARY}--\r\n".encode()]), {
        "Content-Type": f"multipart/form-data; boundary={BOUNDARY}"
    }


class Running:
    """A service at a port of this machine, in a thread of this process."""

    def __init__(self, service: Service, keys: Keys | None = None, hosts: tuple[str, ...] | None = None):
        self.service = service
        config = uvicorn.Config(create_app(service, keys, hosts=hosts), port=0, log_level="error", access_log=False)
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self):
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive()
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        return self

    def __exit__(self, *error):
        self.server.should_exit = True
        self.thread.join()

    def ask(self, method: str, path: str, body: bytes | None = None, headers: dict | None = None):
        """Status and answer, from JSON where it is that."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)
        try:
            connection.request(method, path, body, headers or {})
            answer = connection.getresponse()
            content = answer.read()
            kind = answer.headers["content-type"]
            return answer.status, json.loads(content) if kind == "application/json" else content.decode()
        finally:
            connection.close()

    def post(self, path: str, *fields: tuple[str, bytes | str]):
        return self.ask("POST", path, *form(*fields))

    def json(self, path: str, content: object):
        return self.ask("POST", path, json.dumps(content).encode(), {"Content-Type": "application/json"})


def error(code: str, status: int, told: str = "") -> object:
    """What an answer that is an error equals."""

    class Matching:
        def __eq__(self, found):
            said = found[1]["error"]
            return (found[0], said["code"]) == (status, code) and told in said["message"]

        def __repr__(self):
            return f"{status} {code}: ... {told} ..."

    return Matching()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapters")
    save_adapter(root / "tel", lora_config("linear", r=2), seed=1)
    AdapterFacts("telephony", Base("me/base", None, fingerprint(tiny_model()))).save(root / "tel")
    head = dict(task_type="SEQ_CLS", modules_to_save=["classifier"])
    host = tiny_model(tiny_config(num_labels=2), kind=MRLReDimNetForSequenceClassification)
    host.redimnet.load_state_dict(tiny_model().state_dict())
    save_adapter(root / "gender", lora_config("linear", r=2, **head), host, seed=2)
    facts = AdapterFacts("gender", Base("me/base", None, fingerprint(tiny_model())), "classification", ["low", "high"])
    facts.save(root / "gender")
    return root


def detector() -> DomainDetector:
    """Takes what is loud below 4 kHz for telephony."""
    rng = np.random.default_rng(0)
    tone = [0.2 * np.sin(2 * np.pi * f * np.arange(2 * RATE) / RATE) for f in (500, 700, 900)]
    noise = [0.1 * rng.standard_normal(2 * RATE) for _ in range(3)]
    return DomainDetector.train({"clean": noise, "telephony": [t + 1e-4 * n for t, n in zip(tone, noise, strict=True)]})


def thresholds(encoder: SpeakerEncoder) -> Thresholds:
    found, labels = np.concatenate([np.linspace(-0.5, 0.4, 500), np.linspace(0.2, 1, 500)]), np.repeat([0, 1], 500)
    entries = [
        Threshold.fit(
            found, labels, wanted=0.1, dim=dim, weights=encoder.weights(name), trials="dev", adapter=domain
        )
        for dim in (16, encoder.config.embedding_size)
        for name, domain in ((None, None), ("tel", "telephony"))
    ]  # fmt: skip
    return Thresholds(entries)


@pytest.fixture
def encoder(folders):
    encoder = SpeakerEncoder(tiny_model(), "tiny")
    encoder.adapters.add("tel", folders / "tel")
    encoder.adapters.add("gender", folders / "gender")
    return encoder


@pytest.fixture
def service(encoder, tmp_path):
    return Service(
        encoder,
        open_store(tmp_path / "speakers.db"),
        detector=detector(),
        thresholds=thresholds(encoder),
        namespaces=["anna"],
        log_decisions=True,
        limits=Limits(bytes=2**20, seconds=20, utterances=4),
    )


@pytest.fixture
def running(service):
    with Running(service) as running:
        yield running


# ---------------------------------------------------------------- what it answers


def test_every_way_to_send_audio_gives_the_same_embedding(running, encoder):
    file = voice(1, rate=8000, format="FLAC")
    alone = encoder.embed([file], dim=16)[0]
    ways = [
        running.post("/embed", ("audio", file), ("dim", "16")),
        running.json("/embed", {"audio": base64.b64encode(file).decode(), "dim": 16}),
        running.json("/embed?dim=16", {"audio": [base64.b64encode(file).decode()]}),
        running.ask("POST", "/embed?dim=16", file, {"Content-Type": "audio/flac"}),
        running.ask("POST", "/embed?dim=16&adapter=none", file, {"Content-Type": "application/octet-stream"}),
    ]
    for status, answer in ways:
        assert status == 200, answer
        (found,) = answer["embeddings"]
        assert np.allclose(found["embedding"], alone, atol=1e-4)
        assert (found["seconds"], found["adapter"], found["weights"]) == (2.5, None, encoder.fingerprint)


def test_several_utterances_each_with_the_adapter_that_fits_it(running, encoder, folders):
    rng = np.random.default_rng(3)
    tone, noise = 0.2 * np.sin(2 * np.pi * 600 * np.arange(2 * RATE) / RATE), 0.1 * rng.standard_normal(2 * RATE)
    files = []
    for wave in (tone + 1e-4 * noise, noise):
        file = io.BytesIO()
        soundfile.write(file, wave, RATE, format="WAV", subtype="FLOAT")
        files.append(file.getvalue())
    encoder.adapters.add("telephony", folders / "tel")
    status, answer = running.post("/embed", *(("audio", file) for file in files), ("adapter", "auto"))
    assert status == 200, answer
    assert [each["adapter"] for each in answer["embeddings"]] == ["telephony", None]
    encoder.adapters.set_adapter("tel")  # the same numbers by another name
    expected = encoder.embed(files[:1])[0]
    encoder.adapters.disable()
    assert np.allclose(answer["embeddings"][0]["embedding"], expected, atol=1e-4)


def test_verification_of_two_sides(running, encoder):
    files = [voice(1), voice(2), voice(3)]
    encoder.adapters.set_adapter("tel")
    rule = encoder.decision_rule([2], 16, thresholds=None, threshold=0.3)
    (expected,) = encoder.verify(files[:2], files[2:], 16, threshold=rule)
    encoder.adapters.disable()
    status, answer = running.post(
        "/verify", ("enrol", files[0]), ("enrol", files[1]), ("test", files[2]), ("adapter", "tel"), ("dim", "16")
    )
    assert status == 200, answer
    assert answer["score"] == pytest.approx(expected.score, abs=1e-5)
    saved = running.service.encoder.weights("tel")
    assert (answer["adapter"], answer["dim"], answer["weights"]) == ("tel", 16, saved)
    assert answer["accepted"] is (answer["score"] >= answer["threshold"]) and answer["llr"] is not None
    assert "set on dev for 10 % false accepts" in answer["rule"] and answer["notes"] == []
    short = voice(4, 0.5, pause=3.0)
    status, answer = running.post("/verify", ("enrol", short), ("test", short), ("dim", "16"))
    assert [note[:33] for note in answer["notes"]] == [
        "the enrolment has 0.5 s of speech",
        "test has 0.5 s of speech: below 2",
    ]
    for threshold, accepted in ((-1, True), (1.5, False)):
        status, answer = running.post(
            "/verify", ("enrol", files[0]), ("test", files[2]), ("threshold", str(threshold)), ("dim", "8")
        )
        assert (status, answer["accepted"]) == (200, accepted)
    told = "no threshold for 8 dims"
    assert running.post("/verify", ("enrol", files[0]), ("test", files[2]), ("dim", "8")) == error(
        "no_threshold", 409, told
    )


def test_the_life_of_an_enrolled_speaker(running):
    files = {name: voice(seed) for seed, name in enumerate(("anna", "bert", "Cora/ü ?"))}
    for name, file in files.items():
        status, made = running.post("/enrol", ("audio", file), ("speaker", name), ("consent", f"form of {name}"))
        assert (status, made["speaker"], made["utterances"]) == (200, name, 1), made
    assert running.post("/enrol", ("audio", voice(10)), ("speaker", "anna"))[1]["utterances"] == 2
    for name, file in list(files.items())[1:]:
        status, found = running.post("/identify", ("test", file), ("top", "2"), ("threshold", "0.9"))
        assert (status, found["speaker"], found["enrolled_speakers"]) == (200, name, 3), found
        assert found["notes"] == []
        assert found["candidates"][0]["score"] == pytest.approx(1, abs=1e-4) and len(found["candidates"]) == 2
        status, found = running.post("/verify", ("test", file), ("speaker", name))
        assert (status, found["accepted"]) == (200, True) and found["score"] == pytest.approx(1, abs=1e-4)
    # Never under another adapter or dimension.
    for more in (("adapter", "tel"), ("dim", "16")):
        assert running.post("/identify", ("test", files["bert"]), more) == error("nobody_enrolled", 404)
        found = running.post("/verify", ("test", files["bert"]), ("speaker", "bert"), more)
        assert found == error("unknown_speaker", 404, "What was enrolled with others is never compared")
    assert [each["speaker"] for each in running.ask("GET", "/speakers")[1]["speakers"]] == [*sorted(files)]
    path = "/speakers/Cora%2F%C3%BC%20%3F"
    assert running.ask("GET", path)[1]["speakers"][0]["consent"] == "form of Cora/ü ?"
    logged = running.ask("GET", "/decisions")[1]["decisions"]
    assert len(logged) == 4 and {each["speaker"] for each in logged} == {"bert", "Cora/ü ?"}
    assert all(each["score"] and each["threshold"] and each["space"]["weights"] for each in logged)
    assert running.ask("DELETE", path) == (200, {"speaker": "Cora/ü ?", "deleted": 1})
    assert running.ask("GET", path) == error("unknown_speaker", 404)
    assert running.ask("DELETE", path) == error("unknown_speaker", 404)
    assert {each["speaker"] for each in running.ask("GET", "/decisions")[1]["decisions"]} == {"bert", None}
    store = running.service.store.file
    left = b"".join(file.read_bytes() for file in store.parent.glob(f"{store.name}*"))
    assert b"Cora" not in left and b"bert" in left
    status, found = running.post("/identify", ("test", files["Cora/ü ?"]), ("threshold", "0.9999"))
    assert (status, found["speaker"], found["accepted"]) == (200, None, False)


def test_classification(running, encoder):
    status, answer = running.post("/classify", ("audio", voice(1)), ("adapter", "gender"))
    assert status == 200, answer
    assert set(answer["probabilities"]) == {"low", "high"} and answer["label"] in answer["probabilities"]
    assert sum(answer["probabilities"].values()) == pytest.approx(1)
    assert running.post("/classify", ("audio", voice(1)), ("adapter", "tel")) == error("no_classifier", 409, "'tel'")
    assert running.post("/classify", ("audio", voice(1))) == error("no_classifier", 409, "tiny has no classifier")


def test_a_model_with_a_classifier_of_its_own(tmp_path):
    config = tiny_config(num_labels=2, id2label={0: "no", 1: "yes"}, label2id={"no": 0, "yes": 1})
    save_model(tiny_model(config, kind=MRLReDimNetForSequenceClassification), tmp_path / "model")
    encoder = SpeakerEncoder.from_pretrained(tmp_path / "model", device="cpu")
    with Running(Service(encoder)) as running:
        status, answer = running.post("/classify", ("audio", voice(1)))
        assert (status, set(answer["probabilities"])) == (200, {"no", "yes"})
        assert running.post("/enrol", ("audio", voice(1)), ("speaker", "a")) == error("no_store", 409)
        assert running.ask("GET", "/speakers") == error("no_store", 409)


def test_adapters_are_loaded_from_the_allowed_namespaces_alone(hub, folders, tmp_path, service):
    push_adapter(folders / "tel", "anna/tel", base="anna/base", token=ANNA)
    with Running(service) as running:
        for name in ("bert/tel", "tel", "../anna/tel", "anna/../tel", str(folders / "tel"), "anna/tel/x", "/anna"):
            found = running.ask("PUT", f"/adapters/new?repository={name.replace('/', '%2F')}")
            assert found == error("not_allowed", 403, "of these owners: anna"), name
        assert running.ask("PUT", "/adapters/auto?repository=anna%2Ftel") == error("bad_request", 422)
        assert running.ask("PUT", "/adapters/new?repository=anna%2Fnothing") == error("adapter_unavailable", 502)
        status, loaded = running.ask("PUT", "/adapters/new?repository=anna%2Ftel")
        assert (status, loaded["name"]) == (200, "new"), loaded
        assert running.ask("PUT", "/adapters/new?repository=anna%2Ftel") == error("adapter_refused", 409, "already")
        listed = running.ask("GET", "/adapters")[1]
        assert [each["name"] for each in listed["adapters"]] == ["tel", "gender", "new"]
        assert listed["adapters"][1]["labels"] == ["low", "high"] and listed["namespaces"] == ["anna"]
        assert running.post("/embed", ("audio", voice(1)), ("adapter", "new"))[0] == 200
        assert running.ask("DELETE", "/adapters/new") == (200, {"deleted": "new"})
        assert running.ask("DELETE", "/adapters/new") == error("unknown_adapter", 404)
        told = "There is no adapter 'new'; loaded are: tel, gender."
        assert running.post("/embed", ("audio", voice(1)), ("adapter", "new")) == error("unknown_adapter", 404, told)


def test_state_metrics_and_the_openapi_page(running):
    assert running.ask("GET", "/health") == (200, {"status": "ok"})
    assert running.ask("GET", "/ready") == (200, {"status": "ready"})
    running.post("/verify", ("enrol", voice(1)), ("test", voice(2)))
    running.post("/embed", ("audio", b"no audio"))
    running.ask("GET", "/speakers/a-secret-name")
    status, text = running.ask("GET", "/metrics")
    assert 'mrl_redimnet_requests_total{code="",route="/verify",status="200"} 1.0' in text
    assert 'mrl_redimnet_requests_total{code="bad_audio",route="/embed",status="422"} 1.0' in text
    assert re.search(r'mrl_redimnet_decisions_total\{accepted="(true|false)",kind="verify"\} 1.0', text)
    assert "mrl_redimnet_speech_seconds_total 7.0" in text  # with the two of the start
    assert "a-secret-name" not in text
    status, page = running.ask("GET", "/openapi.json")
    bodies = page["paths"]["/verify"]["post"]["requestBody"]["content"]
    assert set(bodies) == {"multipart/form-data", "application/json", "audio/*"}
    assert set(bodies["application/json"]["schema"]["properties"]) == {
        "test", "enrol", "speaker", "adapter", "dim", "threshold"
    }  # fmt: skip
    assert running.ask("GET", "/docs")[0] == 200


# ---------------------------------------------------------------- what it refuses


def test_bad_requests(running):
    file, json_of = voice(1), lambda text: running.ask("POST", "/embed", text, {"Content-Type": "application/json"})
    assert running.post("/embed") == error("audio_missing", 422)
    assert running.ask("POST", "/embed") == error("audio_missing", 422, "`audio` is missing")
    assert running.post("/embed", ("audio", file), ("adaptor", "tel")) == error("unknown_field", 422, "adaptor")
    assert running.post("/embed", ("audio", file), ("dim", "many")) == error("bad_request", 422, "a whole number")
    assert running.post("/embed", ("audio", file), ("dim", "1000")) == error("bad_dim", 422, "between 1 and")
    assert running.post("/embed", ("audio", "text")) == error("bad_request", 422, "audio: expected a file")
    assert running.post("/embed", ("audio", file), ("dim", b"8")) == error("bad_request", 422, "dim: expected a value")
    assert running.post("/embed", *[("audio", file)] * 5) == error(
        "too_many", 413, "audio: 5 files, this service takes 4"
    )
    assert json_of(b"{") == error("bad_request", 400, "The JSON cannot be read")
    assert json_of(b"[]") == error("bad_request", 400, "no object")
    assert json_of(b'{"audio": "%%%"}') == error("bad_request", 422, "base64")
    assert json_of(b'{"audio": [3]}') == error("bad_request", 422, "base64")
    for value in (b"true", b"1.5", b"[]", b'"x"', b"1e999"):
        assert json_of(b'{"audio": [], "dim": %s}' % value) == error("bad_request", 422, "dim: got"), value
    broken = form(("audio", file))[0][:-30]
    assert running.ask("POST", "/embed", broken, {"Content-Type": "multipart/form-data"}) == error("bad_request", 400)
    assert running.ask("POST", "/embed", b"a=b", {"Content-Type": "application/x-www-form-urlencoded"}) == error(
        "bad_request", 415
    )
    assert running.ask("GET", "/embed") == error("http", 405)
    assert running.ask("GET", "/nothing") == error("not_found", 404)
    assert running.ask("GET", "/speakers?limit=x") == error("bad_request", 422, "limit")
    assert running.post("/verify", ("test", file)) == error("bad_request", 422, "either `enrol`")
    assert running.post("/verify", ("test", file), ("enrol", file), ("speaker", "a")) == error("bad_request", 422)
    assert running.post("/verify", ("enrol", file)) == error("audio_missing", 422, "`test`: got 0")
    assert running.post("/identify", ("test", file), ("top", "0")) == error("bad_request", 422, "top")
    assert running.post("/enrol", ("audio", file)) == error("speaker_missing", 422)
    assert running.post("/enrol", ("audio", file), ("speaker", " ")) == error("bad_request", 422, "printable")


def test_bad_audio(running):
    for path, field in (("/embed", "audio"), ("/identify", "test")):
        assert running.post(path, (field, b"no audio at all")) == error("bad_audio", 422, f"{field} cannot be read")
        assert running.post(path, (field, b"")) == error("bad_audio", 422, "is empty")
        assert running.post(path, (field, voice(1, 0.01))) == error("too_short", 422, "the model needs")
        assert running.post(path, (field, voice(1, 21, 8000))) == error("too_long", 413, "takes 20 s")
    silence = io.BytesIO()
    soundfile.write(silence, np.zeros(3 * RATE), RATE, format="WAV")
    assert running.post("/enrol", ("audio", silence.getvalue()), ("speaker", "a")) == error("no_speech", 422, "silent")
    assert running.post("/enrol", ("audio", voice(1, 1.5)), ("speaker", "a")) == error("too_short", 422, "give 2 s")
    paused = [("audio", voice(1, 1.5, pause=2.0)), ("speaker", "a")]
    assert running.post("/enrol", *paused) == error("too_short", 422, "1.50 s of speech are too little")
    assert running.ask("GET", "/speakers")[1] == {"speakers": []}


def test_too_large_is_refused_whether_it_says_so_or_not(running):
    assert running.ask("POST", "/embed", bytes(2**20 + 1), {"Content-Type": "audio/wav"}) == error("too_large", 413)

    def chunks():
        for _ in range(64):
            yield bytes(2**15)

    connection = http.client.HTTPConnection("127.0.0.1", running.port, timeout=60)
    connection.request("POST", "/embed", chunks(), {"Content-Type": "audio/wav"}, encode_chunked=True)
    answer = connection.getresponse()
    assert (answer.status, json.load(answer)) == error("too_large", 413)
    connection.close()


def test_bad_files_take_no_neighbour_with_them(running, encoder):
    """Many callers at once, a part of them with broken files: everybody gets the answer to their own request."""
    files = {seed: voice(seed, 0.5 + 0.1 * seed) for seed in range(6)}
    expected = {}
    for name in (None, "tel"):
        encoder.adapters.set_adapter(name)
        expected |= {(seed, name): encoder.embed([file])[0] for seed, file in files.items()}
    encoder.adapters.disable()

    def caller(number: int):
        rng = random.Random(number)
        for _ in range(15):
            if rng.random() < 0.2:
                assert running.post("/embed", ("audio", files[1][: rng.randrange(40)]))[0] == 422
                continue
            seed, name = rng.choice(list(expected))
            status, answer = running.post("/embed", ("audio", files[seed]), ("adapter", name or "none"))
            assert status == 200
            assert np.allclose(answer["embeddings"][0]["embedding"], expected[seed, name], atol=1e-3)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(caller, range(8)))


def test_full_services_say_so_at_once(encoder):
    entered, free, plain = threading.Event(), threading.Event(), encoder.embed_padded

    def held(*arguments):
        entered.set()
        free.wait()
        return plain(*arguments)

    service = Service(encoder, batcher=MicroBatcher(encoder, queue_seconds=4), limits=Limits(requests=3))
    with Running(service) as running, ThreadPoolExecutor(3) as pool:
        encoder.embed_padded = held
        try:
            waiting = [pool.submit(running.post, "/embed", ("audio", voice(1)))]
            assert entered.wait(60)
            waiting.append(pool.submit(running.post, "/embed", ("audio", voice(1))))
            while service.batcher.waiting[0] < 1:
                time.sleep(0.01)
            assert running.post("/embed", ("audio", voice(1))) == error("queue_full", 503, "Ask again a little later")
            waiting.append(pool.submit(running.post, "/embed", ("audio", voice(1, 0.3))))
            while service.batcher.waiting[0] < 2:
                time.sleep(0.01)
            assert running.post("/embed", ("audio", voice(1))) == error("too_many_requests", 503)
            assert running.ask("GET", "/health")[0] == 200
        finally:
            free.set()
        assert [each.result()[0] for each in waiting] == [200, 200, 200]


def test_who_hangs_up_does_not_occupy_the_network(encoder):
    entered, free, plain = threading.Event(), threading.Event(), encoder.embed_padded
    rows = []

    def held(waveforms, *arguments):
        entered.set()
        free.wait()
        rows.append(len(waveforms))
        return plain(waveforms, *arguments)

    service = Service(encoder)
    with Running(service) as running, ThreadPoolExecutor(1) as pool:
        encoder.embed_padded = held
        first = pool.submit(running.post, "/embed", ("audio", voice(1)))
        assert entered.wait(60)
        body, headers = form(("audio", voice(2)))
        connection = http.client.HTTPConnection("127.0.0.1", running.port)
        connection.request("POST", "/embed", body, headers)
        while service.batcher.waiting[0] < 1:
            time.sleep(0.01)
        connection.close()
        while service.batcher.waiting[0] > 0:
            time.sleep(0.01)
        free.set()
        assert first.result()[0] == 200
    assert rows == [1]


def test_keys(encoder, tmp_path):
    (tmp_path / "keys").write_text("# of the shop\n0123456789abcdef\n\nanother-key-of-some-length\n")
    with Running(Service(encoder), Keys.load(tmp_path / "keys")) as running:
        body, headers = form(("audio", voice(1)))
        for key in ("0123456789abcdef", "another-key-of-some-length"):
            assert running.ask("POST", "/embed", body, headers | {"Authorization": f"Bearer {key}"})[0] == 200
        for wrong in ({}, {"Authorization": "Bearer # of the shop"}, {"Authorization": "Basic 0123456789abcdef"}):
            assert running.ask("POST", "/embed", body, headers | wrong) == error("unauthorised", 401, "Bearer KEY")
        for path in ("/speakers", "/adapters", "/metrics", "/decisions"):
            assert running.ask("GET", path) == error("unauthorised", 401)
        for path in ("/health", "/ready", "/openapi.json"):
            assert running.ask("GET", path)[0] == 200
    (tmp_path / "keys").write_text("short\n")
    with pytest.raises(ValueError, match=r"keys: keys: expected at least one, each of 16 characters"):
        Keys.load(tmp_path / "keys")


def test_pages_of_other_websites_may_not_ask(encoder):
    with Running(Service(encoder), hosts=("127.0.0.1", "localhost")) as running:
        own = f"127.0.0.1:{running.port}"
        assert running.ask("GET", "/adapters", None, {"Origin": f"http://{own}"})[0] == 200
        assert running.ask("GET", "/adapters", None, {"Origin": "http://evil.example"}) == error("wrong_origin", 403)
        assert running.ask("GET", "/adapters", None, {"Host": "evil.example"}) == error("wrong_host", 403)


def test_enrolment_without_consent_is_refused_where_it_is_required(encoder, tmp_path):
    service = Service(encoder, open_store(tmp_path / "s.db"), require_consent=True)
    with Running(service) as running:
        for more in ([], [("consent", " ")]):
            found = running.post("/enrol", ("audio", voice(1)), ("speaker", "anna"), *more)
            assert found == error("consent_missing", 422)
        assert running.post("/enrol", ("audio", voice(1)), ("speaker", "anna"), ("consent", "form 1"))[0] == 200


def test_without_a_detector(encoder):
    with Running(Service(encoder)) as running:
        assert running.post("/embed", ("audio", voice(1)), ("adapter", "auto")) == error("no_detector", 409)


@pytest.mark.parametrize("wrong", [{"bytes": 0}, {"seconds": -1}, {"enrol_seconds": -1}])
def test_limits_that_make_no_sense(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Limits(**wrong)


# ---------------------------------------------------------------- the command


@pytest.fixture
def start():
    """Starts the command as a process and waits until it is ready; gives the process and its port."""
    started: list[subprocess.Popen] = []

    def starting(folder: Path, *more: str) -> tuple[subprocess.Popen, int]:
        process, port = started_command(folder, *more)
        started.append(process)
        return process, port

    yield starting
    for process in started:
        process.kill()
        process.communicate()


def started_command(folder: Path, *more: str) -> tuple[subprocess.Popen, int]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "mrl_redimnet_cli", "serve", str(folder), "--port", str(port), *more]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    while True:
        try:
            connection = http.client.HTTPConnection("127.0.0.1", port)
            connection.request("GET", "/ready")
            if connection.getresponse().status == 200:
                return process, port
        except ConnectionRefusedError:
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)


def ask(port: int, path: str, *fields) -> tuple[int, dict]:
    body, headers = form(*fields)
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("POST", path, body, headers)
    answer = connection.getresponse()
    return answer.status, json.load(answer)


def under_way(port: int) -> float:
    """How many requests the service has not answered yet."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    connection.request("GET", "/metrics")
    return float(re.search(r"requests_under_way ([\d.]+)", connection.getresponse().read().decode())[1])


@pytest.mark.slow
def test_the_command_drains_on_sigterm_and_loses_nobody_when_killed(tmp_path, folders, start):
    save_model(tiny_model(), tmp_path / "model")
    store = ["--store", str(tmp_path / "speakers.db"), "--adapter", f"tel={folders / 'tel'}", "--enrol-seconds", "0"]
    process, port = start(tmp_path / "model", *store)
    with ThreadPoolExecutor(8) as pool:
        files = [[("audio", voice(seed, 8)) for _ in range(3)] for seed in range(8)]
        asked = [pool.submit(ask, port, "/embed", *each, ("adapter", "tel")) for each in files]
        while under_way(port) + sum(each.done() for each in asked) < 8:
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        answers = [each.result() for each in asked]
    assert [status for status, _ in answers] == [200] * 8
    assert all(len(answer["embeddings"]) == 3 for _, answer in answers)
    process.wait(60)

    process, port = start(tmp_path / "model", *store)
    enrolled, stop = [], threading.Event()

    def enrol():
        for number in range(10**6):
            try:
                if ask(port, "/enrol", ("audio", voice(number, 0.5)), ("speaker", f"s{number}"))[0] == 200:
                    enrolled.append(f"s{number}")
            except OSError:
                break
        stop.set()

    thread = threading.Thread(target=enrol)
    thread.start()
    while len(enrolled) < 10:
        time.sleep(0.01)
    process.kill()
    thread.join()
    process.wait()
    with open_store(tmp_path / "speakers.db") as there:
        assert set(enrolled) <= {each.speaker for each in there.speakers()}


def test_mistakes_on_the_command_line(tmp_path, capsys):
    save_model(tiny_model(), tmp_path / "model")
    model = tmp_path / "model"
    capsys.readouterr()
    assert "ADAPTER: tel is not NAME=SOURCE" in refusal(capsys, "serve", model, "--adapter", "tel")
    assert "nowhere is not a folder" in refusal(capsys, "serve", model, "--adapter", "tel=nowhere")
    assert "DETECTOR: no folder" in refusal(capsys, "serve", model, "--detector", tmp_path / "x")
    assert "cannot be opened as a store" in refusal(capsys, "serve", model, "--store", tmp_path / "no" / "s.db")
    assert "limits: seconds is -1.0" in refusal(capsys, "serve", model, "--max-seconds", "-1")


PAGE = (Path(__file__).parents[1] / "docs" / "serving.md").read_text()


@pytest.mark.skipif(shutil.which("curl") is None, reason="curl is not installed")
def test_the_commands_of_the_page(running, tmp_path):
    """Every curl line of the page gives an answer that is no error."""
    (tmp_path / "a.wav").write_bytes(voice(1))
    (tmp_path / "b.wav").write_bytes(voice(11))
    lines = re.findall(r"^curl .*$", PAGE, flags=re.MULTILINE)
    assert len(lines) == 9
    for line in lines:
        line = line.replace("127.0.0.1:8000", f"127.0.0.1:{running.port}").replace("dim=64", "dim=16")
        done = subprocess.run(shlex.split(line), cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0 and "error" not in json.loads(done.stdout), (line, done.stdout)
    assert running.ask("GET", "/speakers")[1] == {"speakers": []}


def test_the_python_of_the_page(tmp_path, monkeypatch, capsys):
    from mrl_redimnet import recordings

    shutil.copy(recordings.FIRST, tmp_path / "a.wav")  # what a file is shows in its bytes, not in its name
    shutil.copy(recordings.SAME_SPEAKER, tmp_path / "b.wav")
    monkeypatch.chdir(tmp_path)
    code, printed = re.search(
        r"```py\n(from service_client.*?)```\n\n```text\n(.*?)```", PAGE, flags=re.DOTALL
    ).groups()
    encoder = SpeakerEncoder.from_pretrained("nano", device="cpu")
    with Running(Service(encoder, open_store(tmp_path / "speakers.db"))) as running:
        exec(code.replace("127.0.0.1:8000", f"127.0.0.1:{running.port}"), {})
    assert capsys.readouterr().out == printed


def test_the_page_names_every_code_of_errors():
    folder = Path(__file__).parents[1] / "src" / "mrl_redimnet" / "serving"
    text = "".join((folder / name).read_text() for name in ("app.py", "service.py"))
    codes = set(re.findall(r'Refused\(\s*"(\w+)"', text)) | set(re.findall(r'_error\("(\w+)"', text))
    assert len(codes) > 25
    assert {code for code in codes if f"`{code}`" not in PAGE} == {"gone", "internal"}  # nobody is told these


def test_the_client_of_the_examples(running, tmp_path, capsys, monkeypatch):
    import service_client

    for name, seed in (("a.wav", 1), ("b.wav", 2)):
        (tmp_path / name).write_bytes(voice(seed))
    monkeypatch.chdir(tmp_path)
    address = f"http://127.0.0.1:{running.port}"

    def client(*line: str) -> dict:
        assert service_client.main([address, *line]) == 0
        return json.loads(capsys.readouterr().out)

    assert client("embed", "a.wav", "b.wav", "--dim", "16")["dim"] == 16
    assert client("verify", "--enrol", "a.wav", "--test", "b.wav")["accepted"] in (True, False)
    assert client("enrol", "anna ö/", "a.wav", "--consent", "form 1")["consent"] == "form 1"
    assert client("identify", "a.wav")["candidates"][0]["speaker"] == "anna ö/"
    assert client("classify", "a.wav", "--adapter", "gender")["adapter"] == "gender"
    assert client("forget", "anna ö/")["deleted"] == 1
    assert service_client.main([address, "forget", "anna"]) == 1
    assert capsys.readouterr().err == "unknown_speaker: Nobody is enrolled as 'anna'.\n"


# ---------------------------------------------------------------- on Ray Serve


@pytest.mark.slow
def test_the_same_client_and_store_on_ray_serve(tmp_path, folders, monkeypatch, capsys):
    """Two replicas and one store; rows of the base and of an adapter. It starts Ray and two processes."""
    examples = str(Path(__file__).parents[1] / "examples")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("PYTHONPATH", examples)  # of Ray's workers
    for check in ("READY", "HEALTH"):  # of 5 s, which a busy machine needs more than
        monkeypatch.setenv(f"RAY_SERVE_PROXY_{check}_CHECK_TIMEOUT_S", "120")
    ray = pytest.importorskip("ray")
    import serve_with_ray
    import service_client

    save_model(tiny_model(), tmp_path / "model")
    (tmp_path / "a.wav").write_bytes(voice(1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR", configure_logging=False)
    try:
        line = [tmp_path / "model", "--adapter", f"tel={folders / 'tel'}", "--store", tmp_path / "s.db"]
        line += ["--replicas", "2", "--cpus", "0.5", "--port", port]
        serve_with_ray.main([str(argument) for argument in line], blocking=False)
        service = service_client.SpeakerService(f"http://127.0.0.1:{port}")
        encoder = SpeakerEncoder(tiny_model(), "tiny")
        encoder.adapters.add("tel", folders / "tel")
        for name in (None, "tel"):
            encoder.adapters.set_adapter(name)
            (found,) = service.embed([tmp_path / "a.wav"], adapter=name)["embeddings"]
            assert np.allclose(found["embedding"], encoder.embed([tmp_path / "a.wav"])[0], atol=1e-4)
        service.enrol("anna", [tmp_path / "a.wav"])
        for _ in range(8):  # by whichever replica
            assert service.identify(tmp_path / "a.wav")["candidates"][0]["speaker"] == "anna"
        assert service.forget("anna") == {"speaker": "anna", "deleted": 1}
    finally:
        serve_with_ray.serve.shutdown()
        ray.shutdown()
