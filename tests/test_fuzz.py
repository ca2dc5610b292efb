"""Whatever lies in a file or stands on the command line: it is read, or refused in at most three lines."""

import json
import random
import string

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_cli import refused

from ftp_lightning import DynamicRouter, Schedule, ScheduleFamily, TokenPruner, UserError
from ftp_lightning.__main__ import STAGES, main, parse
from ftp_lightning.artifact import StageFolder
from ftp_lightning.data.sources import load_documents
from ftp_lightning.disk.pruned_folder import read_settings
from ftp_lightning.disk.pruned_model import load_pruned
from ftp_lightning.models import load_model
from ftp_lightning.stages.inputs import load_sensitivity
from ftp_lightning.whole_files import inside

some = settings(
    max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
numbers = st.none() | st.booleans() | st.integers() | st.just(10**400) | st.floats() | st.text(max_size=8)
values = st.recursive(
    numbers, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=6), inner, max_size=4)
)


def short(error):
    """Asserts that an error speaks to the user: at most three lines, none of them endless."""
    lines = str(error.value if hasattr(error, "value") else error).splitlines()
    assert 1 <= len(lines) <= 3 and all(len(line) < 1500 for line in lines), lines


def read_or_refuse(read, *arguments):
    """What `read` makes of it; None where it says in words why it does not."""
    try:
        return read(*arguments)
    except UserError as error:
        short(error)
        return None


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut short, lengthened, or with bits flipped."""
    kind = rng.randrange(4)
    if kind == 0:
        return content[: rng.randrange(len(content))]
    if kind == 1:
        return content + rng.randbytes(rng.randrange(1, 200))
    changed = bytearray(content)
    for _ in range(rng.choice((1, 2, 8))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


@pytest.mark.parametrize("kind", [Schedule, ScheduleFamily])
@some
@given(record=values, keys=st.booleans())
def test_a_schedule_file_of_any_json(tmp_path, kind, record, keys):
    head = {"format": f"ftp-lightning/schedule{'s' if kind is ScheduleFamily else ''}", "version": 1}
    if keys and kind is Schedule:
        record = head | {"sparsity": record}
    elif keys:
        record = head | {"schedules": record}
    (tmp_path / "s.json").write_text(json.dumps(record))
    found = read_or_refuse(kind.load, tmp_path / "s.json")
    assert found is None or found.num_blocks > 0


def test_no_flipped_bit_makes_a_schedule_another(tmp_path):
    schedule, path = Schedule([0.0, 0.25, 1 / 3]), tmp_path / "s.json"
    schedule.save(path)
    good = path.read_bytes()
    for place in range(len(good)):
        for bit in range(8):
            path.write_bytes(good[:place] + bytes([good[place] ^ 1 << bit]) + good[place + 1 :])
            found = read_or_refuse(Schedule.load, path)
            assert found in (None, schedule), (place, bit)
    for end in range(len(good) - 2):
        path.write_bytes(good[:end])
        assert read_or_refuse(Schedule.load, path) is None


@pytest.mark.parametrize("text", ["[" * 200_000, '{"a":' * 100_000, "9" * 5000, "\ufeff{}", "nan", ""])
def test_json_that_breaks_parsers(tmp_path, text):
    for name, read in {"s.json": Schedule.load, "f.json": ScheduleFamily.load}.items():
        (tmp_path / name).write_text(text)
        with pytest.raises(UserError) as told:
            read(tmp_path / name)
        short(told)
    (tmp_path / "d.jsonl").write_text(text + "\n")
    assert read_or_refuse(load_documents, str(tmp_path / "d.jsonl"), "all") is None
    (tmp_path / "p").mkdir()
    (tmp_path / "p" / "pruner.json").write_text(text)
    assert read_or_refuse(TokenPruner.load, tmp_path / "p") is None
    with pytest.raises(UserError, match="not a sensitivity"):
        load_sensitivity(str(tmp_path / "s.json"), 3)


def test_a_file_larger_than_any_schedule_is_not_read(tmp_path):
    with (tmp_path / "s.json").open("wb") as file:
        file.truncate(10**12)  # sparse: reading it would take a terabyte
    with pytest.raises(UserError, match="has 1000000000000 bytes, at most 1000000"):
        Schedule.load(tmp_path / "s.json")


@pytest.fixture(scope="module")
def pruned(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fuzz") / "p"
    TokenPruner(DynamicRouter(), Schedule([0.1, 0.2, 0.3])).save(folder, base="embedded")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def put(folder, files):
    folder.mkdir(exist_ok=True)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    return folder


@some
@given(seed=st.integers(0, 2**32), name=st.sampled_from(["pruner.json", "router.safetensors"]))
def test_a_damaged_pruner_is_never_taken_for_another(tmp_path, pruned, seed, name):
    content = damaged(pruned[name], random.Random(seed))
    folder = put(tmp_path / "p", pruned | {name: content})
    found = read_or_refuse(TokenPruner.load, folder)
    if found is not None:  # white space, or a letter of a key that nobody reads
        good = TokenPruner.load(put(tmp_path / "good", pruned))
        assert found.schedule == good.schedule and found.settings() == good.settings()
        state, other = found.router.state_dict(), good.router.state_dict()
        assert all(torch.equal(state[key], other[key]) for key in other)


@some
@given(data=st.data(), value=values)
def test_a_pruner_that_says_anything(tmp_path, pruned, data, value):
    record = json.loads(pruned["pruner.json"])
    place = data.draw(st.sampled_from([(), ("router",), ("settings",)]))
    target = record
    for key in place:
        target = target[key]
    target[data.draw(st.sampled_from(sorted(target)))] = value
    record.pop("sha256", None)
    folder = put(tmp_path / "p", pruned | {"pruner.json": json.dumps(record).encode()})
    read_or_refuse(TokenPruner.load, folder)
    read_or_refuse(read_settings, folder)


@pytest.mark.parametrize("base", ["", 5, ["embedded"], "a\nb", "x" * 10_000, "../../../etc", "/nowhere"])
def test_a_base_that_is_no_model_is_refused(tmp_path, pruned, base):
    record = json.loads(pruned["pruner.json"]) | {"base": base}
    record.pop("sha256")
    with pytest.raises(UserError) as told:
        load_pruned(put(tmp_path / "p", pruned | {"pruner.json": json.dumps(record).encode()}))
    short(told)


@some
@given(lines=st.lists(st.binary(max_size=60) | values.map(lambda v: json.dumps(v).encode()), max_size=6))
def test_jsonl_of_any_bytes(tmp_path, lines):
    (tmp_path / "d.jsonl").write_bytes(b"\n".join(lines))
    read_or_refuse(load_documents, str(tmp_path / "d.jsonl"), "all")


@some
@given(record=st.dictionaries(st.sampled_from(["text", "messages", "instruction", "input", "output"]), values))
def test_records_of_any_values(tmp_path, record):
    (tmp_path / "d.jsonl").write_text(json.dumps(record) + "\n")
    read_or_refuse(load_documents, str(tmp_path / "d.jsonl"), "all")
    (tmp_path / "d.json").write_text(json.dumps([record]))
    read_or_refuse(load_documents, str(tmp_path / "d.json"), "all")


flags = "--config --model --data --budget --budgets --seed --output --levels --tasks --kv --prompt_tokens --nonsense"
words = st.text(string.printable, max_size=10) | st.sampled_from(
    [
        "0.3",
        "-1",
        "1e999",
        "nan",
        "null",
        "true",
        "[1, 2",
        "{a: 1}",
        "!!python/object:os.system",
        "0x10",
        "1,2",
        "\0",
        "/",
    ]
)


@settings(some, max_examples=50)
@given(
    stage=st.sampled_from(sorted(STAGES)), given=st.lists(st.tuples(st.sampled_from(flags.split()), words), max_size=3)
)
def test_any_command_line_is_parsed_or_refused(stage, given):
    read_or_refuse(parse, stage, [f"{flag}={word}" for flag, word in given])


@some
@given(text=st.text(max_size=60) | values.map(json.dumps))
def test_any_config_file_is_parsed_or_refused(tmp_path, text):
    (tmp_path / "c.yaml").write_text(text, encoding="utf-8", errors="replace")
    read_or_refuse(parse, "search", ["--config", str(tmp_path / "c.yaml")])


@some
@given(
    name=st.text(max_size=12) | st.sampled_from(["../x", "a/../../x", "/etc/passwd", ".", "a/b", "..", "link/x", "\0"])
)
def test_no_name_leads_out_of_its_folder(tmp_path, name):
    (tmp_path / "in").mkdir(exist_ok=True)
    if not (tmp_path / "in" / "link").exists():
        (tmp_path / "in" / "link").symlink_to(tmp_path)
    path = inside(tmp_path / "in", name)
    assert path is None or (tmp_path / "in").resolve() in (path.parent.resolve() / path.name).parents


def test_an_artifact_that_lists_others_files_deletes_none_of_them(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_text("1")
    listed = ["../thesis.txt", str(tmp_path / "thesis.txt"), "old", "..", 5, None, "a/../../thesis.txt"]
    (tmp_path / "out" / "provenance.json").write_text(json.dumps({"files": listed, "fingerprint": "another"}))
    with StageFolder(tmp_path / "out", "search", {}, {}, "", overwrite=True) as stage:
        stage.write_text("new", "2")
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    assert not (tmp_path / "out" / "old").exists()
    with StageFolder(tmp_path / "out", "search", {}, {}, "", overwrite=True) as stage, pytest.raises(ValueError):
        stage.write_text("../outside", "3")


def test_a_models_own_code_is_not_run(tmp_path, monkeypatch):
    """`trust_remote_code` is off, and nothing turns it on."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass\n")
    config = {"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}}
    (tmp_path / "m" / "config.json").write_text(json.dumps(config))
    (tmp_path / "m" / "model.safetensors").write_bytes(b"")
    with pytest.raises(UserError) as told:
        load_model(str(tmp_path / "m"))
    short(told)
    assert not (tmp_path / "ran").exists()


def test_keys_are_written_nowhere(command, tmp_path, monkeypatch):
    keys = {name: f"secret-of-{name}" for name in ("WANDB_API_KEY", "HF_TOKEN", "HUGGING_FACE_HUB_TOKEN")}
    for name, key in keys.items():
        monkeypatch.setenv(name, key)
    sizes = "--prompt_tokens 96 --windows 2 --batch_size 2 --generations 0".split()
    status, out, err = command("search", "--model", "random:tiny", "--device", "cpu", *sizes, "--output", "o")
    assert status == 0, err
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()) + (out + err).encode()
    assert len(written) > 1000 and not [key for key in keys.values() if key.encode() in written]


def test_a_broken_line_is_one_message(command, tmp_path):
    (tmp_path / "deep.jsonl").write_text("[" * 100_000 + "\n")
    refused(
        command("search", "--model", "random:tiny", "--data", "deep.jsonl", "--output", "o"), "line 1", "too deeply"
    )
    assert main(["search", "--model", "random:tiny", "--schedule", str(tmp_path)]) == 2
