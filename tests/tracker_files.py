"""What trackers left on the disk, read back without them: {step: figures} of one run."""

import json
import sqlite3
import struct
import zlib

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from wandb.proto.wandb_internal_pb2 import Record

BLOCK, HEADER = 32_768, 7
FULL, LAST = 1, 4


def history(path):
    """history.jsonl, in which updates and evaluations have lines of their own; no line stands twice."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    kinds = [(line["step"], "loss" in line) for line in lines]
    assert len(set(kinds)) == len(kinds)
    return merged((line.pop("step"), line) for line in lines)


def merged(rows):
    steps = {}
    for step, values in rows:
        steps.setdefault(step, {}).update(values)
    return steps


def wandb_records(path):
    """A log of LevelDB's with wandb's own head and plain checksums: records in pieces that cross no block."""
    data = path.read_bytes()
    place, record = HEADER, b""
    assert data[:4] == b":W&B"
    while place + HEADER <= len(data):
        if (left := BLOCK - place % BLOCK) < HEADER:
            place += left
            continue
        checksum, size, kind = struct.unpack("<IHB", data[place : place + HEADER])
        piece = data[place + HEADER : place + HEADER + size]
        assert zlib.crc32(bytes([kind]) + piece) == checksum
        record, place = record + piece, place + HEADER + size
        if kind in (FULL, LAST):
            yield Record.FromString(record)
            record = b""


def wandb(path):
    """(figures, config)"""
    rows, config = [], {}
    for record in wandb_records(path):
        if record.HasField("history"):
            row = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append((row["_step"], plain(row)))
        for update in (record.run.config.update, record.config.update):
            config |= {item.key: json.loads(item.value_json) for item in update if item.key}
    assert len({step for step, _ in rows}) == len(rows)
    return merged(rows), plain(config)


def plain(values):
    """Without what wandb and trackio add."""
    return {name: value for name, value in values.items() if not name.startswith("_")}


def tensorboard(folder):
    """(figures in 32 bits, config as text)"""
    events = EventAccumulator(str(folder)).Reload()
    rows = [(event.step, {name: event.value}) for name in events.Tags()["scalars"] for event in events.Scalars(name)]
    once = [(step, *values) for step, values in rows if "epoch" not in values]
    assert len(set(once)) == len(once)
    return merged(rows), events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()


def trackio(path):
    """(figures, config)"""
    with sqlite3.connect(path) as database:
        ((name, config),) = database.execute("SELECT run_name, config FROM configs").fetchall()
        found = database.execute("SELECT step, metrics FROM metrics WHERE run_name = ? ORDER BY id", (name,)).fetchall()
    rows = [(step, json.loads(values)) for step, values in found]
    kinds = [(step, "loss" in values) for step, values in rows]
    assert len(set(kinds)) == len(kinds)
    return merged(rows), plain(json.loads(config))
