"""The attacks of docs/faults.md, group by group: hostile files, values, models, templates, products, resumes, failing
file operations and signals. Offline.

    python tests/faults/attack.py [--minutes 15] [--only values,yaml] [--seed 0] [--all] [--said]

Of flags and values, of files and damages, of operations and errors, every one has its turn with some of the others;
--all tries every pair.
Each attack is one stage on a tiny random model, in a process forked from this one (see kill.py), with limits on memory
and time. It is handled well where the stage refuses it in at most three lines with status 2, or does its work where the
attack does no harm. Prints a table: tried, refused, worked, tracebacks, hangs, silent (done as if nothing were wrong).
Ends with status 1 where one of the last three is not 0.
"""

from __future__ import annotations

import argparse
import builtins
import errno
import io
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import kill
from kill import SMALL, Ended, arguments_of, differences, files

SECONDS, WAITED, MEMORY = 60, 150, 12 * 2**30
"""Of processor time, of time by the clock, and bytes that an attack may take."""
GENERATE = [
    "generate",
    *SMALL,
    "--prompt",
    "Once there was a mill by the river.",
    "--max_new_tokens",
    "2",
    "--pairs",
    "1",
]


@dataclass
class Attack:
    """What is done, the command, whether it must be refused, and what is broken in its process before it starts."""

    what: str
    arguments: list[str]
    refused: bool = True
    before: Callable[[], None] = lambda: None
    files: list[Path] = field(default_factory=list)


def carried_out(attack: Attack) -> tuple[str, Ended]:
    """(how it ended, what it said): refused, worked, traceback, hang, silent."""

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CPU, (SECONDS, SECONDS))
        attack.before()

    ended = kill.run(attack.arguments, kill_after=WAITED, before=limited)
    if ended.status in (-signal.SIGXCPU, -signal.SIGKILL):
        return "hang", ended
    if ended.clear:
        return "refused", ended
    if ended.status == 0 and "Traceback" not in ended.said:
        return ("silent" if attack.refused else "worked"), ended
    return "traceback", ended


# ---------------------------------------------------------------- the groups

ALL = False
"""Whether every pair is tried; --all."""


def paired(firsts: Iterable[Any], seconds: Iterable[Any], each: int) -> Iterator[tuple[Any, Any]]:
    """Every one of `firsts` with `each` of `seconds`, which come round in turn."""
    seconds = list(seconds)
    for number, first in enumerate(firsts):
        for turn in range(len(seconds) if ALL else min(each, len(seconds))):
            yield first, seconds[(number * each + turn) % len(seconds)]


def special(place: Path) -> dict[str, Path]:
    """Files that are none, each under `place`."""
    place.mkdir(parents=True)
    os.mkfifo(place / "pipe")
    (place / "folder").mkdir()
    (place / "loop").symlink_to(place / "loop")
    (place / "device").symlink_to("/dev/zero")
    (place / "nothing").symlink_to(place / "not there")
    (place / "binary").write_bytes(b"\xff\xfe" + bytes(range(256)))
    (place / "empty").touch()
    with (place / "giant").open("wb") as stream:
        stream.truncate(5 * 2**30)
    return {path.name: path for path in place.iterdir()} | {"missing": place / "missing"}


def of_files(work: Path, base: Path) -> Iterator[Attack]:
    """What is no file, for every flag that names one, and for every file of a pruner."""
    found, search = special(work / "special"), arguments_of("search", base, work / "o")
    commands = {flag: [*GENERATE, f"--output={work}/o"] for flag in ("pruned", "schedule", "config", "model")}
    commands |= {"data": search, "sensitivity": search, "study": ["sweep", f"--output={work}/o"]}
    for flag, name in paired((*commands, "task_data", "pruner.json", "router.safetensors", ".lock"), found, 5):
        path, copy = found[name], work / f"{name}-{flag}"
        if flag in commands:
            yield Attack(f"--{flag} is {name}", [*commands[flag], f"--{flag}={path}"])
        elif flag == "task_data":
            evaluate = [*arguments_of("evaluate", base, work / "o"), "--tasks=mmlu"]
            yield Attack(f"--{flag} is {name}", [*evaluate, f"--{flag}={path}"])
        elif flag == ".lock":
            copy.mkdir()
            (copy / flag).symlink_to(path)
            plain = name in ("binary", "empty", "giant", "missing", "nothing")
            yield Attack(f"{flag} is {name}", [*GENERATE, f"--output={copy}"], refused=not plain)
        else:
            shutil.copytree(base / "train/pruned", copy)
            (copy / flag).unlink()
            (copy / flag).symlink_to(path)
            yield Attack(f"{flag} is {name}", [*GENERATE, f"--pruned={copy}", f"--output={work}/o"])


def of_values(work: Path, base: Path) -> Iterator[Attack]:
    """Empty and odd values, for every flag that is a text or a number."""
    texts = ("pruned", "schedule", "model", "data", "output", "device", "split", "revision", "device_map", "kv")
    for flag, value in paired(texts, ("", " ", "a\0b", "\ud800", "~nosuchuser/x"), 3):
        if not (flag == "revision" and value.startswith("~")):
            yield Attack(f"--{flag} {value!r}", [*GENERATE, f"--output={work}/o", f"--{flag}={value}"])
    numbers = ("pruned", "schedule", "device", "split", "budget", "seed", "max_new_tokens", "limit", "tracking")
    for flag, value in paired(numbers, ("#3", "&x", "[a]", "{a: b}", "!!python/none", "yes"), 4):
        yield Attack(f"--{flag} {value!r}", [*GENERATE, f"--output={work}/o", f"--{flag}={value}"])
    for device in ("meta", "xla", "privateuseone", "cuda:99", "cpu:x"):
        yield Attack(f"--device {device}", [*GENERATE, f"--output={work}/o", f"--device={device}"])


def of_numbers(work: Path, base: Path) -> Iterator[Attack]:
    """Absurd numbers, for every number of `search` and `train`."""
    search, train = (arguments_of(name, base, work / "o") for name in ("search", "train"))
    values = ("-1", "1e300", "-1e300", "1e-320", "nan", "inf", "9" * 30, "1e21")
    both = ("seed", "windows", "prompt_tokens", "continuation_tokens", "budget", "batch_size", "processes")
    searched = (*both, "generations", "offspring", "step", "max_seconds", "recall_share", "min_sparsity", "parents")
    for flag, value in paired(searched, values, 5):
        yield Attack(f"search --{flag} {value}", [*search, f"--{flag}={value}"])
    trained = ("steps", "learning_rate", "lambda_d", "width", "patience", "accumulate", "temperature", "distil_windows")
    for flag, value in paired(trained, values, 5):
        yield Attack(f"train --{flag} {value}", [*train, f"--{flag}={value}"])


EXPLODING = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]\n" for n in range(1, 15))
YAMLS = {
    "exploding": EXPLODING.encode(), "exploding in a list": (EXPLODING + "budgets: *a14").encode(),
    "deep": b"budget: " + b"[" * 100_000, "deep maps": b"{a: " * 20_000, "utf-16": "budget: 0.3".encode("utf-16"),
    "latin-1": "model: é".encode("latin-1"), "null list": b"budgets: null", "null number": b"seed: null",
    "map for a text": b"model: {a: b}", "list for a text": b"output: [a]", "tag": b"model: !!python/name:os.system",
    "several documents": b"--- \nbudget: 0.3\n---\nbudget: 0.4", "a list": b"- budget", "text": b"budget",
    "number": b"5",
    "NUL": b"budget: 0.3\0", "unknown": b"bugdet: 0.3", "a key twice and unknown": b"x: 1\nx: 2", "large": b"#" * 10**7,
}  # fmt: skip


def of_yaml(work: Path, base: Path) -> Iterator[Attack]:
    """Config and sweep files that explode, are deep, or are something else."""
    work.mkdir(parents=True, exist_ok=True)
    for name, content in YAMLS.items():
        path = work / f"{name}.yaml"
        path.write_bytes(content)
        yield Attack(f"config: {name}", [*arguments_of("search", base, work / "o"), "--config", str(path)])
        yield Attack(f"study: {name}", ["sweep", "--study", str(path), f"--output={work}/o"])


CONFIGS: dict[str, list[Any]] = {
    "num_hidden_layers": [10**9, 0, -1, "3", 3.5, None, 4], "vocab_size": [10**12, 0, -5, "x", 4095],
    "hidden_size": [10**9, 0, 63], "intermediate_size": [10**12, 0], "num_attention_heads": [0, 3, 5, 10**6],
    "num_key_value_heads": [0, 3], "head_dim": [0, 15], "max_position_embeddings": [None, "x", 0, -1],
    "hidden_act": ["nosuch", "__import__", 5], "rope_parameters": [{"rope_type": "nosuch"}, 5],
    "model_type": ["bert", "nosuch", ["llama"], None, 5], "dtype": ["float128", 5], "bos_token_id": ["<s>"],
    "eos_token_id": [[1, "x"]], "tie_word_embeddings": ["yes"], "num_labels": [10**9, -1],
    "attn_implementation": ["evil/kernel", "nosuch", 5], "_attn_implementation": ["evil/kernel"],
    "quantization_config": [{"quant_method": name} for name in ("gptq", "awq", "hqq", "bitnet", "fp8", "nosuch")],
    "auto_map": [{"AutoModelForCausalLM": "evil.Model"}],
}  # fmt: skip


def saved_model(place: Path) -> Path:
    """A tiny Llama with the embedded tokenizer, in a folder."""
    from ftp_lightning.models import load

    model, tokenizer = load("random:tiny")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return place


def changed(model: Path, to: Path, name: str, content: bytes) -> Path:
    """A copy of the model with one file changed."""
    shutil.copytree(model, to)
    (to / name).write_bytes(content)
    return to


def of_models(work: Path, base: Path) -> Iterator[Attack]:
    """Configs that are not those of their weights, and files of a model that are something else."""
    model, count = saved_model(work / "model"), 0
    said = json.loads((model / "config.json").read_text())
    harmless = {("auto_map", 0), ("model_type", 3), ("num_hidden_layers", 5), ("head_dim", 0), ("bos_token_id", 0)}

    def attack(what: str, name: str, content: bytes, refused: bool = True) -> Attack:
        nonlocal count
        count += 1
        place = changed(model, work / f"m{count}", name, content)
        return Attack(what, [*GENERATE, f"--model={place}", f"--output={work}/o"], refused)

    for key, values in CONFIGS.items():
        for number, value in enumerate(values):
            content = json.dumps(said | {key: value}).encode()
            yield attack(f"config {key} = {value!r}", "config.json", content, (key, number) not in harmless)
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors"):
        for kind, content in {"[]": b"[]", "5": b"5", "empty": b"", "null": b"null", "binary": b"\xff" * 99}.items():
            yield attack(f"{name} is {kind}", name, content)
        whole = (model / name).read_bytes()
        yield attack(f"{name} is cut", name, whole[: len(whole) // 2])
    for index in ("{}", "[]", '{"weight_map": {"a": "../../x.safetensors"}}'):
        yield attack(f"index is {index}", "model.safetensors.index.json", index.encode())
    for key, value in {
        "num_beams": 0, "return_dict_in_generate": True, "stop_strings": ["x"], "bad_words_ids": "x",
        "penalty_alpha": 0.6, "dola_layers": "high", "cache_implementation": "nosuch", "repetition_penalty": -1.0,
        "constraints": [1], "token_healing": True, "max_new_tokens": -1, "max_length": 1,
    }.items():  # fmt: skip
        content = json.dumps({"eos_token_id": 2, key: value}).encode()
        yield attack(f"generation {key} = {value!r}", "generation_config.json", content, refused=False)


TEMPLATES = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "broken": "{% for %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}", "attribute": "{{ ''.__class__.__mro__ }}",
    "globals": "{{ cycler.__init__.__globals__ }}", "undefined": "{{ nosuch.x }}", "include": "{% include 'x' %}",
    "raises": "{{ raise_exception('no\nuser\nrole') }}", "big": "{{ 'x' * 10 ** 10 }}",
    "format": "{{ '%9999999999d' % 1 }}",
    "range": "{% for a in range(10 ** 9) %}{% endfor %}", "surrogate": "{{ '\\ud800' }}", "number": 5, "list": [],
}  # fmt: skip


def of_templates(work: Path, base: Path) -> Iterator[Attack]:
    """Chat templates that do not end, do not work, or look around."""
    model = saved_model(work / "model")
    (model / "chat_template.jinja").unlink(missing_ok=True)
    said = json.loads((model / "tokenizer_config.json").read_text())
    for name, template in TEMPLATES.items():
        content = json.dumps(said | {"chat_template": template}).encode()
        place = changed(model, work / name, "tokenizer_config.json", content)
        yield Attack(name, [*GENERATE, f"--model={place}", "--apply_chat_template", f"--output={work}/o"])


DATA = {
    "a.csv": b"id,text\n" * 99, "utf16.txt": ("word " * 99).encode("utf-16"), "nul.jsonl": b'{"text": "a\0b"}\n' * 99,
    "half.jsonl": b'{"text": "a', "list.jsonl": b"[]\n", "surrogate.jsonl": b'{"text": "\\ud800 x"}\n',
    "five.json": b"5", "number.jsonl": b'{"text": 5}', "x.parquet": b"PAR1" * 99,
    "deep.json": b"[" * 200_000, "deep.jsonl": b"[" * 200_000,
    "none.jsonl": b'{"messages": [{"role": null, "content": "x"}]}',
    "parts.jsonl": b'{"messages": [{"role": "user", "content": [{"type": "text"}]}]}',
    "empty.txt": b"", "short.txt": b"a b",
}  # fmt: skip


def of_data(work: Path, base: Path) -> Iterator[Attack]:
    """Texts and records that are none, and names in them that would become paths."""
    work.mkdir(parents=True, exist_ok=True)
    search = arguments_of("search", base, work / "o")
    for name, content in DATA.items():
        (work / name).write_bytes(content)
        yield Attack(f"--data {name}", [*search, f"--data={work / name}"])
    for source in (":", "::", "a:b:c", "org/name:../x", "../../etc", "http://x/y"):
        yield Attack(f"--data {source}", [*search, f"--data={source}"])
    for number, subject in enumerate(("../../evil", "/tmp/ftp-evil", "a/b", "", ".", "x" * 300, "a\0b", 7, None)):
        place = work / f"tasks{number}"
        place.mkdir()
        row = {"subject": subject, "question": "q", "choices": ["a", "b", "c", "d"], "answer": 0}
        (place / "mmlu.jsonl").write_text(json.dumps(row))
        evaluate = arguments_of("evaluate", base, work / "o")
        yield Attack(f"mmlu subject {subject!r}"[:60], [*evaluate, "--tasks=mmlu", f"--task_data={place}"])


REPLACED = {
    "deleted": None,
    "empty": b"",
    "{}": b"{}",
    "[]": b"[]",
    "null": b"null",
    "binary": b"\xff\xfe\0",
    "cut": b"cut",
}


def of_products(work: Path, base: Path) -> Iterator[Attack]:
    """Every file of every stage of a finished run, damaged: run again, and the report of it."""
    whole = base / "run"
    names = [path.relative_to(whole) for path in sorted(whole.rglob("*")) if path.is_file()]
    for number, (name, kind) in enumerate(paired(names, REPLACED, 2)):
        copy, content = work / str(number), REPLACED[kind]

        def damage(copy=copy, name=name, content=content) -> None:
            from ftp_lightning.report import page

            page.draw = lambda plot, rows: None  # most of the time of a report, and it sees rows alone
            shutil.copytree(whole, copy)
            if content is None:
                (copy / name).unlink()
            else:
                had = (copy / name).read_bytes()
                (copy / name).write_bytes(had[: len(had) // 2] if content == b"cut" else content)

        yield Attack(f"report of a run, {name} {kind}", ["report", str(copy)], refused=False, before=damage)


def of_resumes(work: Path, base: Path) -> Iterator[Attack]:
    """A killed stage's folder, given to other settings, another stage, other code: refused, and nothing lost."""
    for stage, more in (("search", ["--seed=1"]), ("train", ["--seed=1"]), ("train", ["--steps=9"])):
        output = work / f"{stage}{more[0]}"
        killed_in_the_middle(stage, base, output)
        yield Attack(f"{stage}, then {more[0]}", [*arguments_of(stage, base, output), *more], files=kept(output))
    for first, second in (("train", "search"), ("search", "train"), ("search", "sensitivity")):
        output = work / f"{first}-{second}"
        killed_in_the_middle(first, base, output)
        yield Attack(f"{first}, then {second}", arguments_of(second, base, output), files=kept(output))
    for stage in ("search", "train"):
        output = work / f"{stage}-code"
        killed_in_the_middle(stage, base, output)
        yield Attack(
            f"{stage}, then other code", arguments_of(stage, base, output), before=other_code, files=kept(output)
        )
        for name, number in (("EIO", errno.EIO), ("EMFILE", errno.EMFILE), ("ESTALE", errno.ESTALE)):
            output = work / f"{stage}-{name}"
            killed_in_the_middle(stage, base, output)
            what = "state.json" if stage == "search" else "last.ckpt"
            before = partial(unreadable, what, number)
            yield Attack(
                f"{stage}, {name} on {what}", arguments_of(stage, base, output), before=before, files=kept(output)
            )


def killed_in_the_middle(stage: str, base: Path, output: Path) -> None:
    """A stage that was killed once it had saved something; again where it was too quick."""
    for _ in range(9):
        kill.run(arguments_of(stage, base, output), kill_when=lambda: bool(kept(output)))
        if kept(output) and not (output / "provenance.json").exists():
            return
        shutil.rmtree(output)


def kept(output: Path) -> list[Path]:
    """What an unfinished stage is resumed from."""
    return [path for path in (output / "state.json", output / "checkpoints/last.ckpt") if path.exists()]


def other_code() -> None:
    import ftp_lightning.artifact as artifact

    artifact.code_version = lambda: "another"


def unreadable(name: str, number: int) -> None:
    """Reading files of this name fails in this process."""
    opened = io.open

    def failing(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if not isinstance(file, int) and os.fspath(file).endswith(name) and "r" in mode:
            raise OSError(number, os.strerror(number), os.fspath(file))
        return opened(file, mode, *args, **kwargs)

    io.open = builtins.open = failing


OPERATIONS = ("open", "replace", "mkdir", "unlink", "scandir")


def failing_operation(output: Path, which: int, number: int) -> None:
    """The n-th file operation below `output` fails in this process, once."""
    seen = 0

    def counted(function: Callable, *args: Any, **kwargs: Any) -> Any:
        nonlocal seen
        if args and not isinstance(args[0], int) and str(args[0]).startswith(str(output)):
            seen += 1
            if seen == which:
                raise OSError(number, os.strerror(number), str(args[0]))
        return function(*args, **kwargs)

    for name in OPERATIONS:
        setattr(os, name, partial(counted, getattr(os, name)))
    io.open = builtins.open = partial(counted, io.open)


def of_operations(work: Path, base: Path) -> Iterator[Attack]:
    """One failing file operation in `search` and `train`, then the same command again: the same result."""
    errors = (errno.EACCES, errno.ESTALE, errno.EMFILE, errno.ENOMEM, errno.ENOSPC, errno.EIO)
    for (stage, which), number in paired([(s, n) for n in range(1, 40, 3) for s in ("search", "train")], errors, 1):
        output = work / f"{stage}-{which}-{number}"
        before = partial(failing_operation, output, which, number)
        what = f"{stage}: {errno.errorcode[number]} at operation {which}"
        yield Attack(what, arguments_of(stage, base, output), refused=False, before=before)


GROUPS = {
    "files": of_files, "values": of_values, "numbers": of_numbers, "yaml": of_yaml, "models": of_models,
    "templates": of_templates, "data": of_data, "products": of_products, "resumes": of_resumes,
    "operations": of_operations,
}  # fmt: skip


# ---------------------------------------------------------------- the table


def tried(name: str, base: Path, work: Path, until: float, said: bool) -> Counter:
    """All attacks of a group until its time is up."""
    found: Counter = Counter()
    for attack in GROUPS[name](work, base):
        if time.monotonic() > until:
            found["left out"] += 1
            continue
        before = {path: path.read_bytes() for path in attack.files}
        how, ended = carried_out(attack)
        if any(not path.exists() or path.read_bytes() != content for path, content in before.items()):
            how = "lost"
        if name == "operations" and how in ("refused", "worked"):
            how = same_after(attack, base, how)
        found["tried"] += 1
        found[how] += 1
        if said or how in BAD:
            print(f"{name}: {attack.what}: {how}: {ended.said[-200:]!r}", file=sys.stderr, flush=True)
    return found


def same_after(attack: Attack, base: Path, how: str) -> str:
    """The same command once more, without the fault: whether it comes to the undisturbed result."""
    again = kill.run(attack.arguments)
    stage, output = attack.arguments[0], Path(attack.arguments[-1])
    return how if again.status == 0 and not differences(files(base / stage, stage), files(output, stage)) else "lost"


BAD = ("traceback", "hang", "silent", "lost")


def stopped(base: Path, work: Path, until: float, rng: random.Random) -> Counter:
    """Signals at random moments of every stage and of `run`: leaves within 5 s with 128 + n, and resumes."""
    found: Counter = Counter()
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1)
    took = {
        name: kill.run(arguments_of(name, base, work / f"took-{name}")).seconds for name in ("search", "train", "run")
    }
    for turn in range(80 if ALL else 24):
        name, number, output = (*took, "search")[turn % 4], numbers[turn // 4 % 4], work / f"stopped-{turn}"
        if time.monotonic() > until:
            found["left out"] += 1
            continue
        ended, left_in = kill.signalled(arguments_of(name, base, output), number, rng.uniform(0, took[name]))
        found["tried"] += 1
        heeded = kill.heeded(ended, number, output)
        again = kill.run(arguments_of(name, base, output))
        wrong = again.status or differences(files(base / name, name), files(output, name))
        if not heeded:
            how = "traceback"
        elif left_in > 5.5:
            how = "hang"
        else:
            how = "lost" if wrong else "worked"
        found[how] += 1
        if how in BAD:
            print(f"signals: {name}, {number.name}: {how}, {ended.status}, {left_in:.1f} s, {wrong}", file=sys.stderr)
            print(ended.said[-4000:], file=sys.stderr)
    return found


COLUMNS = ("tried", "refused", "worked", "traceback", "hang", "silent", "lost", "left out")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15.0, help="when to stop; what is left out is said")
    parser.add_argument("--only", default="", help=f"groups: {', '.join((*GROUPS, 'signals'))}")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--all", action="store_true", help="every pair of flag and value, file and damage, and so on")
    parser.add_argument("--said", action="store_true", help="print what every attack was told")
    chosen = parser.parse_args()
    global ALL
    ALL = chosen.all
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    kill._import_all()
    names = [name for name in (*GROUPS, "signals") if not chosen.only or name in chosen.only.split(",")]
    end, rows = time.monotonic() + 60 * chosen.minutes, {}
    print("| group | " + " | ".join(COLUMNS) + " |\n|---" + "|---:" * len(COLUMNS) + "|", flush=True)
    with tempfile.TemporaryDirectory(prefix="attack-") as place:
        os.chdir(place)  # where a name that should have been refused becomes a folder
        base = Path(place) / "base"
        for stage in ("search", "train", *(["run"] if {"products", "signals"} & set(names) else [])):
            kill.run(arguments_of(stage, base, base / stage))
        for number, name in enumerate(names):
            until = time.monotonic() + (end - time.monotonic()) / (len(names) - number)
            if name == "signals":
                rows[name] = stopped(base, Path(place) / name, until, random.Random(chosen.seed))
            else:
                rows[name] = tried(name, base, Path(place) / name, until, chosen.said)
            shutil.rmtree(Path(place) / name, ignore_errors=True)
            spent = resource.getrusage(resource.RUSAGE_CHILDREN)
            print(f"{name}: {spent.ru_utime + spent.ru_stime:.0f} s of processor time so far", file=sys.stderr)
            print(f"| {name} | " + " | ".join(str(rows[name][column]) for column in COLUMNS) + " |", flush=True)
    return int(any(found[how] for found in rows.values() for how in BAD))


if __name__ == "__main__":
    sys.exit(main())
