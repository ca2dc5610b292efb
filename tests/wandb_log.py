"""Reads an offline run of wandb back, without a server: the transaction log is LevelDB's log format around protobuf."""

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path

BLOCK, HEADER = 32768, 7


def records(path: Path) -> Iterator:
    """The records of a `.wandb` file, whole ones only."""
    from wandb.proto import wandb_internal_pb2 as proto

    data = path.read_bytes()
    assert data[:4] == b":W&B"
    position, parts = HEADER, []
    while position + HEADER <= len(data):
        if BLOCK - position % BLOCK < HEADER:
            position += BLOCK - position % BLOCK
            continue
        _, length, kind = struct.unpack("<IHB", data[position : position + HEADER])
        chunk = data[position + HEADER : position + HEADER + length]
        position += HEADER + length
        parts.append(chunk)
        if kind in (1, 4):  # whole, or the last part
            record = proto.Record()
            record.ParseFromString(b"".join(parts))
            parts = []
            yield record


def _items(items) -> dict:
    found: dict = {}
    for item in items:
        *outer, last = list(item.nested_key) or [item.key]
        place = found
        for name in outer:
            place = place.setdefault(name, {})
        place[last] = json.loads(item.value_json)
    return found


def read_run(folder: Path, patience: float = 20.0) -> dict:
    """The one offline run under `folder`: id, name, group, job_type, config, history, artifacts (name, type, paths).

    wandb's own process writes on after `finish` has come back, so this waits for the run's end.
    """
    (path,) = folder.rglob("offline-run-*/*.wandb")
    last = time.monotonic() + patience
    while (run := _read(path))["exit"] is None and time.monotonic() < last:
        time.sleep(0.1)
    return run


def _read(path: Path) -> dict:
    run = {"config": {}, "history": [], "artifacts": [], "exit": None}
    for record in records(path):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            told = record.run
            run |= {"id": told.run_id, "group": told.run_group, "job_type": told.job_type, "sweep": told.sweep_id}
            run["name"] = told.display_name
            run["config"] |= _items(told.config.update)
        elif kind == "config":
            run["config"] |= _items(record.config.update)
        elif kind == "history":
            run["history"].append(_items(record.history.item))
        elif kind == "artifact":
            run["artifacts"].append(_artifact(record.artifact))
        elif kind == "request" and record.request.WhichOneof("request_type") == "log_artifact":
            run["artifacts"].append(_artifact(record.request.log_artifact.artifact))
        elif kind == "exit":
            run["exit"] = record.exit.exit_code
    return run


def _artifact(artifact) -> tuple[str, str, list[str]]:
    return artifact.name, artifact.type, [entry.path for entry in artifact.manifest.contents]
