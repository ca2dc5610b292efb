"""Faults, done to real stages: killed at random points, full and read-only disks, broken files, two runs at once.

    python tests/faults/kill.py [--kills 6] [--seed 0] [--only killed,broken] > docs-table

Every stage runs in a process forked from this one, which has imported everything: a start costs no imports, and a
SIGKILL is a real one. After each fault the stage is run again as its user would, and what it leaves is held against an
uninterrupted run, byte by byte but for measured times. What is neither the same nor one clear error is a FAILURE, and
the exit status says so.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import pkgutil
import random
import resource
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

SMALL = "--model random:tiny --device cpu --tracking none --prompt_tokens 96 --continuation_tokens 16".split()
TRAIN = "--steps 8 --batch_size 1 --validations 4 --validation_windows 2 --learning_rate 0.01".split()
SEARCH = "--windows 4 --stage_windows 2 --generations 4 --offspring 3 --survivors 2 --batch_size 2".split()
EVALUATE = "--tasks story_name --limit 3 --windows 2 --batch_size 2".split()
CHAIN = """--sensitivity_windows 2 --search_windows 2 --generations 1 --finetune_generations 1 --offspring 2 --steps 2
    --batch_size 1 --tasks story_name --limit 2 --test_windows 2 --lengths 32 --pairs 2""".split()
TUNE = """--prompts embedded --prompt_tokens 16 --continuation_tokens 2 --limit 30 --keep 0.3 --cuts 0.1""".split()
PROMPT = "Once there was a mill by the river."
STUDY = """# Does training matter?
program: ftp_lightning
method: grid
metric: {name: kl, goal: minimize}
command: ["${env}", "${interpreter}", "-m", "ftp_lightning", "trial", "${args}"]
parameters:
  model: {value: random:tiny}
  device: {value: cpu}
  prompt_tokens: {value: 48}
  continuation_tokens: {value: 8}
  steps: {value: 2}
  items: {value: 3}
  validation_windows: {value: 2}
  calibration_windows: {value: 2}
  generations: {value: 1}
  test_windows: {value: 3}
  seed: {values: [0]}
  router: {values: [dynamic, static]}
"""
STAGES = {
    "sensitivity": [*SMALL, "--windows", "4", "--batch_size", "2"],
    "search": [*SMALL, *SEARCH],
    "train": [*SMALL, *TRAIN, "--budget", "0.4"],
    "finetune": ["--pruned", "{base}/train/pruned", *SMALL, *SEARCH],
    "evaluate": ["--pruned", "{base}/train/pruned", *SMALL, *EVALUATE],
    "benchmark": ["--pruned", "{base}/train/pruned", *SMALL, "--lengths", "32", "--pairs", "2"],
    "generate": ["--pruned", "{base}/train/pruned", *SMALL, "--prompt", PROMPT, "--least_tokens", "0"],
    "run": [*SMALL, *CHAIN],
    "sweep": ["--study", "{base}/study.yaml", "--output", "{output}/study"],
    "tune": [*SMALL[:6], *TUNE, "--own_answers", "{output}/answers", "--output", "{output}/tune"],
}  # fmt: skip
"""Stage -> its arguments, tiny in every size. `{base}` holds the uninterrupted runs, `{output}` is its place."""
SERVE = "serve --model random:tiny --device cpu --pruned {base}/train/pruned --least_tokens 0 --port {port}".split()
TIMED = ("provenance.json", "config.yaml", "benchmark", "generate/", "report.html", ".lock", "report/", "logs/")
"""Parts of paths whose content tells times or places: there they must be whole, not equal."""
RESUMED = ("checkpoints/", ".training/")
"""Parts of paths of what a stage only needs to go on."""


@dataclass
class Row:
    """One line of the table."""

    what: str
    times: int = 0
    same: int = 0
    errors: Counter = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)


@dataclass
class Ended:
    """How a stage ended: the exit status (negative: by that signal), what it said, and how long it took."""

    status: int
    said: str
    seconds: float

    @property
    def clear(self) -> bool:
        """One error of at most three lines, beside the lines of progress."""
        lines = [line for line in self.said.splitlines() if not line.startswith(PROGRESS)]
        return self.status == 2 and 1 <= len(lines) <= 3 and "Traceback" not in self.said


PROGRESS = tuple(f"{name}: " for name in (*STAGES, "report", "study study")) + ("[", "\r")


def start(arguments: list[str], said: Path, before: Callable[[], None] = lambda: None) -> int:
    """The process of a stage, forked; its stderr goes to a file."""
    child = os.fork()
    if child:
        return child
    status = 70
    try:
        os.setsid()
        stream = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(stream, 2), os.dup2(stream, 1)
        before()
        from ftp_lightning.__main__ import main

        status = main(arguments)
    except SystemExit as left:
        status = left.code if isinstance(left.code, int) else 1
    except BaseException:
        import traceback

        with contextlib.suppress(OSError):
            traceback.print_exc()
    finally:
        with contextlib.suppress(OSError):
            sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


def run(
    arguments: list[str],
    kill_after: float | None = None,
    before: Callable[[], None] = lambda: None,
    kill_when: Callable[[], bool] = lambda: False,
) -> Ended:
    """Run a stage to its end, or kill it so many seconds after its start, or when something is so."""
    with tempfile.TemporaryDirectory() as place:
        said, began = Path(place) / "said", time.monotonic()
        child, ended = start(arguments, said, before), None
        while ended is None:
            found, status = os.waitpid(child, os.WNOHANG)
            if found:
                ended = os.waitstatus_to_exitcode(status)
            elif (kill_after is not None and time.monotonic() - began > kill_after) or kill_when():
                _kill(child)
                kill_after, kill_when = None, lambda: False
            else:
                time.sleep(0.001)
        text = said.read_text(errors="replace") if said.exists() else ""
        return Ended(ended, text, time.monotonic() - began)


def signalled(arguments: list[str], number: int, after: float) -> tuple[Ended, float]:
    """Send a stage a signal so many seconds after its start. Returns how it ended, and how long that took."""
    with tempfile.TemporaryDirectory() as place:
        said, began = Path(place) / "said", time.monotonic()
        child, sent = start(arguments, said), 0.0
        while not (found := os.waitpid(child, os.WNOHANG))[0]:
            now = time.monotonic()
            if not sent and now - began > after and said.exists():
                sent = now
                os.kill(child, number)
            elif sent and now - sent > 60:
                _kill(child)
            time.sleep(0.002)
        left_in = time.monotonic() - sent if sent else 0.0
        text = said.read_text(errors="replace") if said.exists() else ""
        return Ended(os.waitstatus_to_exitcode(found[1]), text, time.monotonic() - began), left_in


def heeded(ended: Ended, number: int, output: Path) -> bool:
    """Whether a stage left as that signal wants it: with 128 + n, or 0 where it was done. Before Python has set its
    handlers, and once the work is done, the system ends the process; a shell tells it as 128 + n too."""
    if ended.status == -number:
        return not ended.said or (output / "provenance.json").exists()
    return ended.status in (0, 128 + number)


def _kill(child: int) -> None:
    """It and what it has started, where it has come so far as to lead a group."""
    try:
        os.killpg(child, signal.SIGKILL)
    except ProcessLookupError:
        os.kill(child, signal.SIGKILL)


def arguments_of(name: str, base: Path, output: Path) -> list[str]:
    stage = "search" if name == "finetune" else name
    words = [word.format(base=base, output=output) for word in STAGES[name]]
    return [stage, *words, *([] if "--output" in words else ["--output", str(output)])]


def files(folder: Path, stage: str = "") -> dict[str, bytes]:
    """STAGE/name -> content of what a stage has written; what it only needs to go on is not looked at."""
    return {
        f"{stage}/{path.relative_to(folder).as_posix()}": path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and not any(part in path.relative_to(folder).as_posix() for part in RESUMED)
    }


def differences(whole: dict[str, bytes], found: dict[str, bytes]) -> list[str]:
    """What of a finished folder is not as in the uninterrupted run; times may differ, a file may not be broken."""
    wrong = [f"{name} is missing" for name in whole.keys() - found.keys()]
    left = [name for name in found.keys() - whole.keys() if not name.endswith(".lock") and ".broken-" not in name]
    wrong += [f"{name} was left behind" for name in left]
    for name in whole.keys() & found.keys():
        timed = any(part in name for part in TIMED)
        if not timed and untimed(name, whole[name]) != untimed(name, found[name]):
            wrong.append(f"{name} differs")
    return wrong + broken(found)


def untimed(name: str, content: bytes) -> Any:
    """A file's content; of a tuning's JSON without the times that it measures."""
    if not name.startswith("tune/tune/") or not name.endswith(".json"):
        return content
    return _without_speed(json.loads(content))


def _without_speed(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_speed(one) for key, one in value.items() if not key.startswith("speed")}
    if isinstance(value, list):
        return [_without_speed(one) for one in value if "first token of a typical" not in str(one)[:200]]
    return value


def broken(found: dict[str, bytes]) -> list[str]:
    """Files that a reader would choke on; those still being written have another name."""
    wrong = []
    for name, content in found.items():
        if name.endswith(".json") and ".partial" not in name:
            try:
                json.loads(content)
            except ValueError:
                wrong.append(f"{name} is half a file")
    return wrong


def half_written(folder: Path) -> list[str]:
    """After a kill: what is there under its own name is whole, and what is called finished has all its files."""
    wrong = broken(files(folder))
    for record in folder.rglob("provenance.json"):
        for name in json.loads(record.read_text())["files"]:
            if not (record.parent / name).exists():
                wrong.append(f"{record.parent.name}/{name} of a finished stage is lost")
    return wrong


# ---------------------------------------------------------------- the faults


def dying(output: Path, log: Path, which: int = 0) -> None:
    """Count this process's file operations below `output`, one byte of `log` each; at the one asked for, SIGKILL."""
    stream, seen = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 0

    def operation(event: str, about: tuple[Any, ...]) -> None:
        nonlocal seen
        if event in OPERATIONS and str(about[0]).startswith(str(output)):
            seen += 1
            os.write(stream, b".")
            if seen == which:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(operation)


OPERATIONS = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.listdir", "os.scandir", "os.link")


def killed(name: str, base: Path, work: Path, kills: int, rng: random.Random, took: dict[str, float]) -> Row:
    """SIGKILL of one stage, again and again, until it has been killed `kills` times: in turn at a random moment and at
    a random one of the file operations that an undisturbed run does."""
    row, done, number = Row(f"SIGKILL, `{name}`"), 0, 0
    whole, operations = files(base / name, name), (base / f"{name}.operations").stat().st_size
    while done < kills:
        output = work / f"{name}-{number}"
        number += 1
        for _ in range(min(4, kills - done)):
            after, which = (rng.uniform(0, took[name]), 0) if done % 2 else (None, rng.randint(1, operations))
            before = partial(dying, output, work / "operations", which)
            ended = run(arguments_of(name, base, output), kill_after=after, before=before)
            if ended.status != -signal.SIGKILL:
                break
            done += 1
            row.times += 1
            row.failures += half_written(output) if output.exists() else []
        check(row, name, base, whole, output)
    return row


def killed_server(base: Path, work: Path, kills: int, rng: random.Random) -> Row:
    """SIGKILL of a server alone, in turn while it starts, rests and answers. What it started must end, nothing may be
    left where it ran, and the same command must answer what `generate` answers."""
    row, place, said = Row("SIGKILL, `serve`"), work / "serve", work / "said"
    answers = json.loads((base / "generate" / "generation.json").read_text())
    place.mkdir()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    arguments, took = [word.format(base=base, port=port) for word in SERVE], 5.0
    for number in range(kills + 1):
        said.unlink(missing_ok=True)
        server, began = start(arguments, said, partial(os.chdir, place)), time.monotonic()
        if number % 3 or number == kills:
            if not _ready(server, said):
                row.failures.append(f"the server does not start: {said.read_text()[-300:]}")
                return row
            took = time.monotonic() - began
            wrong = [f"{mode} answers {text!r}" for mode, text in asked(port).items() if text != answers[mode]]
            row.failures += wrong
            row.same += not wrong
        if number % 3 == 2:
            threading.Thread(target=_unanswered, args=(port,), daemon=True).start()
        time.sleep(rng.uniform(0, 0.7 if number % 3 else took))
        os.kill(server, signal.SIGTERM if number == kills else signal.SIGKILL)
        row.times += number < kills
        status = os.waitstatus_to_exitcode(os.waitpid(server, 0)[1])
        row.failures += [f"SIGTERM: exit status {status}"] * (number == kills and status != 0)
        row.failures += [f"`{one}` outlives the server" for one in _outliving(server)]
        row.failures += [f"{path} was left behind" for path in place.rglob("*")]
    return row


def _ready(server: int, said: Path) -> bool:
    """Waits for the server's ready line; False where the server ends first."""
    while not (said.exists() and "ready: http" in said.read_text()):
        if os.waitpid(server, os.WNOHANG)[0]:
            return False
        time.sleep(0.02)
    return True


def asked(port: int, tokens: int = 24) -> dict[str, str]:
    """ "dense", "pruned" -> the greedy answer of the server."""
    found = {}
    for name, mode in (("dense", "off"), ("pruned", "always")):
        fields = {"prompt": PROMPT, "max_tokens": tokens, "temperature": 0, "ftp_mode": mode}
        about = {"data": json.dumps(fields).encode(), "headers": {"content-type": "application/json"}}
        with urllib.request.urlopen(urllib.request.Request(f"http://127.0.0.1:{port}/v1/completions", **about)) as got:
            found[name] = json.load(got)["choices"][0]["text"]
    return found


def _unanswered(port: int) -> None:
    """A long request; that it fails is what it is for."""
    with contextlib.suppress(OSError, ValueError):
        asked(port, 400)


def _outliving(server: int, patience: float = 300.0) -> list[str]:
    """The commands of processes of a dead server's session that are still there after some time: a worker first
    imports what it needs, and only then looks for its parent."""
    end = time.monotonic() + patience
    while (left := _of_session(server)) and time.monotonic() < end:
        time.sleep(0.05)
    return left


def _of_session(leader: int) -> list[str]:
    found = []
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, session = (place / "stat").read_text().rpartition(") ")[2].split()[:4]
            if state != "Z" and int(session) == leader:
                found.append((place / "cmdline").read_text().replace("\0", " ")[:120])
    return found


def check(row: Row, name: str, base: Path, whole: dict[str, bytes], output: Path) -> None:
    """Run it to its end, and hold it against the uninterrupted run."""
    ended = run(arguments_of(name, base, output))
    if ended.status == 0:
        wrong = differences(whole, files(output, name))
        row.failures += wrong
        row.same += not wrong
    elif ended.clear:
        row.errors[_error(ended)] += 1
    else:
        row.failures.append(f"exit status {ended.status}: {ended.said[-300:]}")


def _error(ended: Ended) -> str:
    line = next(line for line in ended.said.splitlines() if not line.startswith(PROGRESS))
    words = [word for word in line.split() if "/" not in word]
    return " ".join(words)[:90]


def full_disk(name: str, base: Path, work: Path, rng: random.Random) -> Row:
    """Files may only have so many bytes, then any number; a write beyond gets what a full disk gives."""
    row, whole = Row(f"no space, `{name}`"), files(base / name, name)
    largest = max(map(len, whole.values()))
    for number in range(3):
        output, most = work / f"full-{name}-{number}", rng.randrange(200, largest)

        def limit(most=most) -> None:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

        first = run(arguments_of(name, base, output), before=limit)
        row.times += 1
        if first.clear:
            row.errors[_error(first)] += 1
        elif first.status != 0:
            row.failures.append(f"exit status {first.status}: {first.said[-300:]}")
        row.failures += half_written(output) if output.exists() else []
        check(row, name, base, whole, output)
    return row


@contextlib.contextmanager
def small_disk(place: Path, kilobytes: int) -> Iterator[bool]:
    """A disk of this size mounted at `place`; False where this user may not mount."""
    place.mkdir(parents=True, exist_ok=True)
    options = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(place)]
    mounted = subprocess.run(options, capture_output=True, check=False).returncode == 0
    try:
        yield mounted
    finally:
        if mounted:
            subprocess.run(["umount", "-l", str(place)], check=False)


def real_full_disk(name: str, base: Path, work: Path, rng: random.Random) -> Row:
    """A disk of 8 to 64 kB; then it grows."""
    row, whole = Row(f"full disk (tmpfs), `{name}`"), files(base / name, name)
    for number in range(2):
        place = work / f"disk-{name}-{number}"
        with small_disk(place, rng.choice((8, 16, 24, 48))) as mounted:
            if not mounted:
                row.errors["not tried: mounting is not permitted"] += 1
                return row
            first = run(arguments_of(name, base, place / "out"))
            row.times += 1
            if first.clear:
                row.errors[_error(first)] += 1
            elif first.status != 0:
                row.failures.append(f"exit status {first.status}: {first.said[-300:]}")
            subprocess.run(["mount", "-o", "remount,size=64m", str(place)], check=True)
            check(row, name, base, whole, place / "out")
    return row


def read_only(base: Path, work: Path) -> Row:
    """A folder on a disk that is mounted read-only, for every stage."""
    row, place = Row("read-only output, all stages"), work / "read-only"
    with small_disk(place, 1024) as mounted:
        if not mounted:
            row.errors["not tried: mounting is not permitted"] += 1
            return row
        subprocess.run(["mount", "-o", "remount,ro", str(place)], check=True)
        for name in STAGES:
            ended = run(arguments_of(name, base, place / name))
            row.times += 1
            if ended.clear:
                row.errors[_error(ended)] += 1
            else:
                row.failures.append(f"{name}, exit status {ended.status}: {ended.said[-300:]}")
    return row


def damaged(content: bytes, rng: random.Random) -> bytes:
    """Cut short, or with a bit or a few of them flipped."""
    if rng.random() < 0.4 or not content:
        return content[: rng.randrange(max(1, len(content)))]
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 4))):
        changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def broken_inside(name: str, what: str, base: Path, work: Path, took: float, rng: random.Random, times: int) -> Row:
    """What an interrupted stage goes on from is damaged: it must come to the same end all the same."""
    row, whole = Row(f"damaged {what}, `{name}`"), files(base / name, name)
    for number in range(4 * times):
        if row.times == times:
            break
        output = work / f"inside-{name}-{what.replace('/', '-')}-{number}"
        run(arguments_of(name, base, output), kill_after=took * rng.uniform(0.5, 0.95))
        path = output / what
        if not path.exists() or (output / "provenance.json").exists():
            continue
        path.write_bytes(damaged(path.read_bytes(), rng))
        row.times += 1
        check(row, name, base, whole, output)
    return row


def broken_input(name: str, what: str, base: Path, work: Path, rng: random.Random, times: int) -> Row:
    """What an earlier stage has written is damaged: an error, or a damage that changes nothing."""
    row, whole = Row(f"damaged input {what}, `{name}`"), files(base / name, name)
    for number in range(times):
        copy = work / f"input-{name}-{Path(what).name}-{number}"
        shutil.copytree(base / "train", copy / "train")
        shutil.copytree(base / "search", copy / "search")
        path = copy / what
        path.write_bytes(damaged(path.read_bytes(), rng))
        arguments = arguments_of(name, copy, copy / "out")
        if what.endswith("schedule.json"):
            arguments += ["--schedule", str(path)]
            whole = {}
        row.times += 1
        ended = run(arguments)
        if ended.clear:
            row.errors[_error(ended)] += 1
        elif ended.status == 0 and path.read_bytes() and not whole:
            row.same += _same_value(base / what, path, row)
        elif ended.status == 0:
            wrong = [one for one in differences(whole, files(copy / "out", name)) if "config" not in one]
            row.failures += wrong
            row.same += not wrong
        else:
            row.failures.append(f"exit status {ended.status}: {ended.said[-300:]}")
    return row


def _same_value(good: Path, damaged: Path, row: Row) -> bool:
    """Whether a damaged schedule that was taken says the same as before."""
    from ftp_lightning import Schedule

    same = Schedule.load(good) == Schedule.load(damaged)
    if not same:
        row.failures.append(f"{damaged.name} was taken with other numbers")
    return same


def two_at_once(name: str, base: Path, work: Path) -> Row:
    """A second run comes into the same folder while the first is at work."""
    row, whole, output = Row(f"two runs in one folder, `{name}`"), files(base / name, name), work / f"two-{name}"
    arguments = arguments_of(name, base, output)
    with tempfile.TemporaryDirectory() as place:
        first = start(arguments, Path(place) / "said")
        while not (output / ".lock").exists():
            time.sleep(0.001)
        second = run(arguments)
        _, status = os.waitpid(first, 0)
    row.times = 1
    if second.clear:
        row.errors[_error(second)] += 1
    else:
        row.failures.append(f"the second: exit status {second.status}: {second.said[-300:]}")
    wrong = differences(whole, files(output, name)) + [f"the first: {status}"] * bool(status)
    row.failures += wrong
    row.same += not wrong
    return row


def dead_rank(name: str, base: Path, work: Path, rng: random.Random) -> Row:
    """One of two processes is killed; the same command then goes on to what two undisturbed ones find."""
    row, whole_folder = Row(f"a rank that dies, `{name} --processes 2`"), work / f"whole-two-{name}"
    command = [sys.executable, "-m", "ftp_lightning"]
    first = _two(command + arguments_of(name, base, whole_folder) + ["--processes", "2"])
    if first.status:
        row.failures.append(f"undisturbed: {first.said[-300:]}")
        return row
    output = work / f"dead-{name}"
    arguments = command + arguments_of(name, base, output) + ["--processes", "2"]
    ended = _two(arguments, output, rng)
    row.times = 1
    if ended.clear:
        row.errors[_error(ended)] += 1
    elif ended.status:
        row.failures.append(f"exit status {ended.status}: {ended.said[-600:]}")
    row.failures += half_written(output) if output.exists() else []
    again = _two(arguments)
    wrong = differences(files(whole_folder, name), files(output, name)) + [again.said[-300:]] * bool(again.status)
    row.failures += wrong
    row.same += not wrong
    return row


def _two(command: list[str], output: Path | None = None, rng: random.Random | None = None) -> Ended:
    """A command of two processes; with `output`, one of them is killed once something of the work is saved there."""
    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(command, stdout=said, stderr=said, env=os.environ | {"OMP_NUM_THREADS": "1"})
        while output is not None and process.poll() is None:
            saved = (output / "state.json").exists() or (output / "checkpoints/last.ckpt").exists()
            children = _workers(process.pid)
            if saved and children:
                os.kill(rng.choice(children), signal.SIGKILL)
                break
            time.sleep(0.005)
        status = process.wait()
        said.seek(0)
        return Ended(status, said.read(), 0.0)


def _workers(parent: int) -> list[int]:
    """The processes that multiprocessing has spawned for a parent, but for its own helper."""
    found = subprocess.run(
        ["ps", "-o", "pid=,args=", "--ppid", str(parent)], capture_output=True, text=True, check=False
    )
    return [int(line.split()[0]) for line in found.stdout.splitlines() if "spawn_main" in line]


# ---------------------------------------------------------------- the table


def table(rows: list[Row]) -> str:
    """GitHub's markdown."""
    lines = [
        "| what | times | ends with the same result | ends with one clear error | failures |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        errors = "; ".join(f"{count} x {text}" for text, count in row.errors.items())
        failures = f"{len(row.failures)}: {row.failures[0][:200]}" if row.failures else "0"
        lines.append(f"| {row.what} | {row.times} | {row.same} | {errors} | {failures} |")
    return "\n".join(lines)


def faults(kills: int, seed: int, only: tuple[str, ...], stages: tuple[str, ...], work: Path) -> list[Row]:
    """All faults asked for, each a row, told as they come."""
    rng, base, took, rows = random.Random(seed), work / "base", {}, []
    base.mkdir()
    (base / "study.yaml").write_text(STUDY)
    for name in dict.fromkeys(("search", "train", *stages, *["generate"] * ("serve" in stages))):
        if name == "serve":
            continue
        counted = partial(dying, base / name, base / f"{name}.operations")
        ended = run(arguments_of(name, base, base / name), before=counted)
        took[name] = ended.seconds
        print(f"undisturbed {name}: {ended.seconds:.1f} s, status {ended.status}", file=sys.stderr, flush=True)
        if ended.status:
            raise SystemExit(ended.said)
    for kind, fault in _planned(kills, stages, base, work, rng, took):
        if not only or kind in only:
            rows.append(fault())
            print(table(rows[-1:]).splitlines()[-1], file=sys.stderr, flush=True)
    return rows


INSIDE = (
    ("search", "state.json"),
    ("train", "checkpoints/last.ckpt"),
    ("train", "checkpoints/best.ckpt"),
    ("train", "checkpoints/history.jsonl"),
)
INPUTS = (
    ("evaluate", "train/pruned/pruner.json"),
    ("evaluate", "train/pruned/router.safetensors"),
    ("generate", "search/schedule.json"),
)


def _planned(
    kills: int, stages: tuple[str, ...], base: Path, work: Path, rng: random.Random, took: dict[str, float]
) -> Iterator[tuple[str, Callable[[], Row]]]:
    """(kind, fault) of all there is to try on these stages."""
    some = [name for name in ("search", "train", "evaluate") if name in stages]
    for name in stages:
        if name == "serve":
            yield "killed", partial(killed_server, base, work, kills, rng)
        else:
            yield "killed", partial(killed, name, base, work, kills, rng, took)
    for name in some:
        yield "full", partial(full_disk, name, base, work, rng)
        yield "full", partial(real_full_disk, name, base, work, rng)
    yield "readonly", partial(read_only, base, work)
    for name, what in INSIDE:
        if name in stages:
            yield "broken", partial(broken_inside, name, what, base, work, took[name], rng, kills)
    for name, what in INPUTS:
        if name in stages:
            yield "input", partial(broken_input, name, what, base, work, rng, 2 * kills)
    for name in some:
        yield "two", partial(two_at_once, name, base, work)
    for name in some[:2]:
        yield "rank", partial(dead_rank, name, base, work, rng)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=6, help="kills of each stage, and damages of each file")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="kinds: killed, full, readonly, broken, input, two, rank")
    parser.add_argument("--stages", default=",".join((*STAGES, "serve")))
    chosen = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    _import_all()
    only, stages = (tuple(filter(None, text.split(","))) for text in (chosen.only, chosen.stages))
    with tempfile.TemporaryDirectory(prefix="faults-") as work:
        rows = faults(chosen.kills, chosen.seed, only, stages, Path(work))
    print(table(rows))
    return int(any(row.failures for row in rows))


LIBRARIES = "lightning transformers lm_eval.tasks deap matplotlib.pyplot jsonargparse safetensors.torch".split()


def _import_all() -> None:
    """What the stages import, once: children that are forked have it."""
    import torch

    import ftp_lightning

    torch.set_num_threads(1)
    ours = [found.name for found in pkgutil.walk_packages(ftp_lightning.__path__, "ftp_lightning.")]
    for name in [*LIBRARIES, *(name for name in ours if not name.endswith("__main__"))]:
        importlib.import_module(name)


if __name__ == "__main__":
    sys.exit(main())
