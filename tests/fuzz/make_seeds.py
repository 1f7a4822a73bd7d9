"""Writes the valid inputs of the corpus anew: `python -m tests.fuzz.make_seeds`. Needed when a format changed, only."""

from __future__ import annotations

import base64
import hashlib
import io
import json
import zipfile
from pathlib import Path

import numpy as np

from agent import config, protocol
from agent.worker import follow, golden
from ota import blocks, delta, payload
from ota.client import keyring, memfd, sealed
from ota.client.fsops import Fs
from ota.client.journal import Floor, Record, encode
from ota.client.limits import Limits
from ota.client.machine import LineRecord, State
from ota.client.ports import Installed
from ota.client.store import Store
from ota.client.transfer import Transfer
from ota.errors import Reason
from ota.publisher import settings
from tests.contract import operators
from tests.crash.memory import MemoryDisk
from tests.fuzz import answers, known_keys, lifecycle, parsers, repository
from tests.fuzz.engine import CORPUS
from tests.ota.client.simulator import Simulator

ROOT = Path(__file__).resolve().parents[2]


def keep(parser: str, name: str, data: bytes) -> None:
    path = CORPUS / parser / f"valid-{name}"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)


def documents() -> None:
    simulator = Simulator()
    old = simulator.build("person", "1.0.0", {"int8": parsers.BASE}, b"golden", codec="raw")
    new = simulator.build("person", "1.1.0", {"int8": parsers.PLAIN, "fp16": parsers.BASE}, b"golden", bases=[old])
    keep("release", "release.json", json.dumps(json.loads(new.data), indent=1).encode())
    for role in repository.ROLES:
        keep(f"trust-{role}", f"{role}.json", repository.signed_part(role))
    grants = json.loads(repository.signed_part("desired"))["grants"]
    keep("grants", "grants.json", json.dumps(grants).encode())
    for name, text in (
        ("plain", '{"a": [1, 2.5e3, -7], "b": {"c": null, "d": "\\u00e9"}}'),
        ("deep", "[" * 32 + "]" * 32),
    ):
        keep("strictjson", f"{name}.json", text.encode())
    keep("names", "release", b"person/1.1.0/release.json\n" + b"a" * 64)
    keep("names", "role", b"release-person")
    keep("names", "hash", b"0" * 64)
    installed = Installed("person", "1.0.0", 3, "a" * 64, "int8", "b" * 64, "c" * 64)
    quarantine = {"e" * 64: Reason.OVER_BUDGET}
    line = LineRecord(
        "person", State.TESTING, installed, None, "1.1.0", "d" * 64, installed, 2, quarantine, 3, "a" * 64
    )
    record = Record({"person": line}, {"fleet": {"root": Floor(3, "f" * 64)}}, "2026-01-01T00:00:00+00:00")
    keep("journal", "record", encode(record, 7).partition(b"\n")[2])
    graph = {
        "task": "detection",
        "labels": ["bolt", "nut"],
        "preprocess": {"resize": "letterbox", "interpolation": "linear", "color": "rgb", "mean": [0.0], "std": [255.0]},
        "postprocess": {"kind": "centernet", "stride": 8, "threshold": 0.3, "max_detections": 50, "nms_iou": 0.5},
    }
    keep("graph", "detection.json", json.dumps(graph).encode())
    keep("graph", "raw.json", b'{"task": "raw"}')
    anchors = {"grids": [19, 19, 1, 1], "aspects": [1.0, 2.0], "reduced": False}
    for task, kind, keys in (
        ("detection", "ssd", {"anchors": anchors, "scores": "softmax", "scales": [10.0, 10.0, 5.0, 5.0]}),
        ("keypoints", "yolo_pose", {"key_points": 17, "normalized": True}),
        ("segmentation", "segmentation", {"background": [0], "max_points": 90}),
    ):
        picture = {"roi": [0.1, 0.2, 0.9, 1.0], "pad": 0, "constants": {"size": [640.0, 480.0]}, "input": "x"}
        made = {"task": task, "labels": ["a"], "preprocess": picture, "postprocess": {"kind": kind, **keys}}
        keep("graph", f"{kind}.json", json.dumps(made).encode())
    found = [{"label": "bolt", "score": 0.9, "box": [1.0, 2.0, 30.5, 40.25]}, {"label": "nut", "box": [0, 0, 5, 5]}]
    keep("found", "boxes.json", follow.written(found))


def payloads() -> None:
    keep("payload", "sealed", payload.seal(parsers.PLAIN, parsers.KEY, parsers.CONTEXT))
    keep("payload", "empty", payload.seal(b"", parsers.KEY, parsers.CONTEXT))
    keep("delta-zstd", "frame", delta.encode("zstd", parsers.PLAIN))
    keep("delta-zstd-patch", "patch", delta.encode("zstd-patch", parsers.PLAIN, parsers.BASE))
    keep("delta-raw", "file", parsers.PLAIN)
    transfer = Transfer(parsers.map_payload(), Limits(), 0)
    keep("map", "none", transfer.bitmap())
    disk = MemoryDisk()
    fs = Fs(disk)
    store = Store(fs, parsers.KEY, 0)

    def fill(view: memoryview) -> None:
        view[:] = parsers.PLAIN

    store.put(memfd.write_sealed("seed", len(parsers.PLAIN), fill), parsers.PLAIN_SHA256, len(parsers.PLAIN))
    keep("store", "file", fs.read_at(f"store/{parsers.PLAIN_SHA256}.cbs", 0, 1 << 20))
    vector = golden.Vector(b"", (np.zeros((1, 4), np.float32),), {"int8": (np.ones((1, 2), np.int8),)})
    keep("golden", "vectors.npz", golden.dump_vectors([vector]))
    rng = np.random.default_rng(5)
    for family in (operators.convolutions, operators.fully_connected, operators.means, operators.sums):
        keep("tflite", f"{family.__name__}.tflite", next(family(rng, "int8")))


def messages() -> None:
    asked = {
        "meta": blocks.Request(7, blocks.Metadata("release-person", 3), 0, 65536, 1 << 20),
        "timestamp": blocks.Request(7, blocks.Metadata("timestamp", None), 0, 65536, 1 << 14),
        "desired": blocks.Request(7, blocks.Desired(), 0, 65536, 1 << 18),
        "target": blocks.Request(7, blocks.Target("person/1.1.0/release.json", "a" * 64), 0, 65536, 1 << 20),
        "blob": blocks.Request(7, blocks.Blob("b" * 64), 65536, 65536, None),
    }
    for name, request in asked.items():
        keep("block-request", f"{name}.json", request.encode())
        keep("block-request-id", f"{name}.json", request.encode())
    body = b'{"signed": {}}'
    head = blocks.Header(7, 0, len(body)).encode()
    keep("block-answer", "ok", head + b"status=ok sha256=" + hashlib.sha256(body).hexdigest().encode() + b"\n" + body)
    for action, line in (("check", None), ("check", "person"), ("rollback", "person")):
        command = {"v": 1, "id": "c-1", "action": action, "line": line, "expires_at": 1_900_000_000}
        keep("command", f"{action}-{line}.json", json.dumps(command).encode())
    keep("command", "report.json", b'{"v": 1, "id": "c-1", "action": "report", "expires_at": 1900000000}')
    keep("hint", "hint.json", b'{"v": 1, "line": "person", "spread_s": 30}')
    keep("topic", "cmd", b"edge/v1/edge/cam-1/cmd")
    keep("topic", "blk", b"edge/v1/edge/cam-1/blk/get")
    result = protocol.Result(7, 1, 2, [1, 2, 3, 4], [{"label": "nut", "score": 0.5, "box": [0, 0, 1, 1]}])
    loaded = protocol.ModelLoaded("onnx:cpu", 1.0, 12.5, 1 << 20, "onnxruntime 1.31", "", "", [], [])
    for message in (result, loaded, protocol.Fault("model_shape", "wrong", "export again"), protocol.StopWorker()):
        keep("worker-message", type(message).__name__, protocol.encode(message))
    post = b'POST /v1/check HTTP/1.1\r\nhost: a\r\ncontent-length: 18\r\n\r\n{"line": "person"}'
    chunked = b"POST /v1/check HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    keep("control", "post", post)
    keep("control", "chunked", chunked)
    keep("control", "pipelined", b"GET /v1/status HTTP/1.1\r\nhost: a\r\n\r\n" * 2)


def files() -> None:
    keep("agent-toml", "example.toml", config.example().encode())
    keep("agent-toml", "full.toml", FULL_CONFIG)
    keep("repo-toml", "repo.toml", settings.to_toml(settings.Settings()))
    for line in ("parts", "digits"):
        keep("spec-toml", f"{line}.toml", (ROOT / f"models/{line}/1.1.0/spec.toml").read_bytes())
    device, authority = known_keys.certificates(repository.DEVICE)
    bundle = {
        "version": 1,
        "device": repository.DEVICE,
        "tenant": "edge",
        "certificate": device,
        "ca": authority,
        "broker": {"host": "broker.example", "port": 8883},
        "root": repository.repository().documents["root", 1].decode(),
    }
    keep("bundle", "bundle.json", json.dumps(bundle, indent=1).encode())
    request = {
        "version": 1,
        "device": repository.DEVICE,
        "csr": known_keys.csr(repository.DEVICE),
        "hpke_public": base64.b64encode(known_keys.hpke_public()).decode(),
    }
    keep("enroll-request", "request.json", json.dumps(request, indent=1).encode())


def life() -> None:
    keep("token", "token", lifecycle.enrolment.token_text(lifecycle.token()).encode())
    keep("ring", "ring.json", lifecycle.ring())
    header = sealed.Header("0" * 16, 5).pack(keyring.MAGIC)
    keep("sealed-header", "file", header + bytes(payload.sealed_length(5)))
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for name, data in lifecycle.DOCUMENTS.items():
            archive.writestr(name, data)
    keep("zip", "stick.zip", packed.getvalue())
    pem, _ = known_keys.certificates("cam-1")
    keep("certificate", "device.pem", pem.encode())
    keep("https-address", "address", b"https://updates.example:8443/fleet")
    keep("server-address", "address", b"https://enrol.example:8884")
    keep("window", "night", b"22:30-05:00")
    keep("settings-toml", "settings.toml", SETTINGS)
    request = {**lifecycle.enroll_request(lifecycle.KNOWN), "token": "@token"}
    keep("listener-enroll", "request.json", json.dumps(request, indent=1).encode())
    keep("listener-renew", "request.json", lifecycle.renew_request(lifecycle.KNOWN))


def answered() -> None:
    document, block = b'{"signed": {}}', bytes(range(256)) * 16
    keep("https-document", "whole", answers.response(document))
    keep("https-document", "chunked", answers.chunked(document))
    keep("https-block", "range", answers.response(block, "206 Partial Content", Content_Range="bytes 4096-8191/9000"))
    keep("https-block", "whole", answers.response(block * 2))
    keep("ca-answer", "ca", answers.response(json.dumps({"version": 1, "ca": answers.kept_ca()}).encode()))
    keep("enroll-answer", "bundle", answers.response(b'{"version": 1, "bundle": "{}"}'))
    error = {"version": 1, "error": "device_revoked", "message": "no", "hint": "", "evidence": {"root": "AAAA"}}
    refused = answers.response(json.dumps(error).encode(), "403 Forbidden")
    (CORPUS / "enroll-answer" / "refused-revoked").write_bytes(refused)


SETTINGS = b"""\
[update]
poll_s = 600
metered = true
windows = ["22:00-05:00"]

[[source]]
name = "front"
kind = "video"
path = "/srv/front.mp4"

[[line]]
name = "parts"
source = "front"
"""
FULL_CONFIG = b"""\
state_dir = "/var/lib/edge-agent"
run_dir = "/run/edge-agent"
profile = "auto"
workers = "unit"

[telemetry]
results = "off"
interval_s = 2.5

[update]
poll_s = 600
probation_s = 60
metered = true

[[source]]
name = "front"
kind = "video"
path = "front.mp4"
policy = "live"
loop = true
queue_frames = 4
fps = 12.5

[[line]]
name = "parts"
source = "front"
threads = 2
explore = "never"
delegates = ["onnx:cpu", "litert:xnnpack"]
"""


if __name__ == "__main__":
    documents()
    payloads()
    messages()
    files()
    life()
    answered()
    print(f"{sum(1 for _ in CORPUS.rglob('valid-*'))} valid inputs in {CORPUS}")
