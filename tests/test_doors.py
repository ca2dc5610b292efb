"""What a user names is opened by one door: no file, device, encoding, YAML, value or model folder gets past it in a
traceback, and none is waited for."""

import json
import os
from datetime import datetime

import pytest
import yaml
from tiny import random_llama

from ftp_lightning import UserError
from ftp_lightning.__main__ import parse
from ftp_lightning.cells import csv_cell, markdown_text, yaml_text
from ftp_lightning.data.records import record_text
from ftp_lightning.data.sources import load_documents
from ftp_lightning.data.template import checked, limited, rendered
from ftp_lightning.evaluation.harness.task_data import by_subject
from ftp_lightning.models import load_model
from ftp_lightning.named_file import named_path, parse_yaml, read_named_text, read_yaml
from ftp_lightning.serving.prompts import template_named
from ftp_lightning.stages.serve import ServeStage

EXPLODING = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [{', '.join(['*a' + str(n - 1)] * 9)}]\n" for n in range(1, 20))
MERGING = "a0: &a0 {x: 1}\n" + "".join(f"a{n}: &a{n} {{<<: [*a{n - 1}, *a{n - 1}]}}\n" for n in range(1, 16))
YAMLS = {
    "merging": MERGING.encode(),
    "a key twice": b"seed: 1\nbudget: 0.3\nseed: 2",
    "a key twice, deep": b"a: [{x: 1, x: 2}]",
    "exploding": EXPLODING.encode(),
    "deep": b"a: " + b"[" * 5000,
    "deep map": b"{a: " * 300 + b"}" * 300,
    "utf-16": "budget: 0.3".encode("utf-16"),
    "latin-1": "model: é".encode("latin-1"),
    "a tag that runs code": b"model: !!python/object/apply:os.system [true]",
    "broken": b"budget: [0.4",
    "large": b"#" * 300_000,
}


@pytest.mark.parametrize("name", YAMLS)
def test_yaml_that_is_none_or_explodes_is_refused(tmp_path, name):
    (tmp_path / "config.yaml").write_bytes(YAMLS[name])
    with pytest.raises(UserError, match="config.yaml"):
        read_yaml(tmp_path / "config.yaml")
    with pytest.raises(UserError, match="config.yaml"):
        parse("search", ["--config", str(tmp_path / "config.yaml")])


def test_yaml_is_parsed_once_and_says_what_pyyaml_reads(monkeypatch):
    text = "base: &base {a: 1, b: [x, 0.5]}\nown: {<<: *base, a: 2}\nagain: *base\nday: 2026-07-26\n"
    expected, texts, begin = yaml.safe_load(text), [], yaml.reader.Reader.__init__
    monkeypatch.setattr(yaml.reader.Reader, "__init__", lambda self, text: texts.append(text) or begin(self, text))
    assert parse_yaml(text, "config.yaml") == expected and expected["own"] == {"a": 2, "b": ["x", 0.5]}
    assert len(texts) == 1


@pytest.mark.parametrize("content, said", [("# nothing", "holds no settings"), (f"seed: {'9' * 6000}", "digits")])
def test_a_config_that_says_nothing_or_too_much(tmp_path, content, said):
    (tmp_path / "config.yaml").write_text(content)
    with pytest.raises(UserError, match=f"config.yaml.*{said}"):
        parse("search", ["--config", str(tmp_path / "config.yaml")])


@pytest.mark.parametrize(
    "words", [["--seed", "1", "--seed", "x"], ["--seed", "x", "--seed", "1"], ["--seed=1", "--seed=x"]]
)
def test_of_a_flag_given_twice_the_wrong_value_is_named(words):
    with pytest.raises(UserError, match="seed is 'x'"):
        parse("search", words)


def special(tmp_path, kind):
    place = tmp_path / kind
    if kind == "pipe":
        os.mkfifo(place)
    elif kind == "folder":
        place.mkdir()
    elif kind == "loop":
        place.symlink_to(place)
    elif kind == "sparse giant":
        with place.open("wb") as stream:
            stream.truncate(5 * 2**30)
    elif kind == "device":
        place.symlink_to("/dev/zero")
    return place


SPECIAL = ("pipe", "folder", "loop", "sparse giant", "device", "missing")


@pytest.mark.parametrize("kind", SPECIAL)
def test_what_is_no_regular_file_of_a_sane_size_is_refused_and_not_waited_for(tmp_path, kind):
    place = special(tmp_path, kind)
    for read in (read_named_text, read_yaml):
        with pytest.raises(UserError):
            read(place)
    for stage, flag in (("search", "config"), ("sweep", "study")):
        with pytest.raises(UserError):
            parse(stage, [f"--{flag}", str(place)]).trials()


@pytest.mark.parametrize("kind", ["pipe", "device"])
@pytest.mark.parametrize("flag", ["pruned", "schedule", "data", "model"])
def test_what_a_stage_hashes_is_a_file_or_a_folder(tmp_path, kind, flag):
    with pytest.raises((UserError, OSError)) as told:
        parse("evaluate", [f"--{flag}", str(special(tmp_path, kind))]).identity()
    assert isinstance(told.value, UserError)


@pytest.mark.parametrize("value", ["", " ", "a\0b", "\ud800", "~nosuchuser/x"])
@pytest.mark.parametrize("flag", ["pruned", "schedule", "output", "model", "data", "split", "device"])
def test_a_value_that_names_nothing_is_refused_and_not_taken_as_not_given(flag, value):
    with pytest.raises(UserError, match=flag):
        parse("evaluate", [f"--{flag}={value}"])


@pytest.mark.parametrize("value", ["#3", "&x", "null", "~", "5", "1e-3", "2026-01-01", "[a]", "{a: 1}", "yes"])
def test_text_on_the_command_line_is_taken_as_it_is(value):
    if value == "~":
        assert parse("search", ["--output", value]).output == "~"
    else:
        assert parse("search", ["--output", value]).output == value


@pytest.mark.parametrize("flag", ["limit=#3", "limit=", "limit=&x", "threshold=#3", "threshold=yes", "limit=1.5"])
def test_a_number_or_list_that_is_none_is_refused(flag):
    with pytest.raises(UserError, match=flag.partition("=")[0]):
        parse("evaluate", [f"--{flag}"])


def test_an_empty_list_is_one_only_where_it_says_something():
    assert parse("evaluate", ["--tasks="]).tasks == parse("evaluate", ["--tasks", "[]"]).tasks == ()
    for stage, name in (("search", "budgets"), ("train", "factors")):
        with pytest.raises(UserError, match=name):
            parse(stage, [f"--{name}="])


def test_null_says_that_there_is_no_number_and_settings_are_read_back(tmp_path):
    settings = parse("evaluate", ["--limit", "null", "--compare", "[]", "--threshold", "0.25"])
    assert (settings.limit, settings.compare, settings.threshold) == (None, (), 0.25)
    (tmp_path / "c.yaml").write_text(json.dumps(settings.config()))
    assert parse("evaluate", ["--config", str(tmp_path / "c.yaml")]) == settings


@pytest.mark.parametrize("line", ["budgets: null", "seed: null", "output: [a, b]", "limit: true", "model: null"])
def test_a_config_file_cannot_give_what_a_setting_is_not(tmp_path, line):
    (tmp_path / "c.yaml").write_text(line)
    with pytest.raises(UserError, match=line.partition(":")[0]):
        parse("trial" if line.startswith("limit") else "search", ["--config", str(tmp_path / "c.yaml")])


@pytest.mark.parametrize(
    "flag",
    ["processes=1000000", "generations=1000000000000000000000", "step=1e-300", "windows=1000000000000",
     "seed=18446744073709551616", "seed=4294967296", "budget=1e-320", "max_seconds=inf", "max_seconds=nan",
     "recall_share=nan", "min_sparsity=1e300", "offspring=1000000000", "prompt_tokens=1000000000000"],
)  # fmt: skip
def test_absurd_numbers_are_refused_where_they_are_born(flag):
    name, value = flag.split("=")
    with pytest.raises(UserError, match=f"{name} is .*must be|{name}.*{value}"):
        parse("search", [f"--{flag}"])


@pytest.mark.parametrize("subject", ["../../evil", "/tmp/evil", "a/b", "", ".", "x" * 300, "a\0b", 7, None, ["a"]])
def test_no_name_in_data_becomes_a_path(tmp_path, subject):
    row = {"subject": subject, "question": "q", "choices": ["a", "b"], "answer": 0}
    (tmp_path / "mmlu.jsonl").write_text(json.dumps(row))
    with pytest.raises(UserError, match="is not a subject"):
        by_subject({"test": tmp_path / "mmlu.jsonl"}, tmp_path / "out" / "deep")
    assert [path.name for path in tmp_path.rglob("*")] == ["mmlu.jsonl"]


@pytest.mark.parametrize("suffix", [".csv", ".parquet", ".pdf", ".gz"])
def test_tables_and_archives_are_not_read_as_prose(tmp_path, suffix):
    (tmp_path / f"a{suffix}").write_text("id,text\n1,words and words\n" * 100)
    with pytest.raises(UserError, match="not plain text"):
        load_documents(str(tmp_path / f"a{suffix}"), "all")


def test_lines_of_json_have_two_names_and_other_scripts_have_words(tmp_path):
    (tmp_path / "a.ndjson").write_text("".join(json.dumps({"text": f"some words {n} " * 9}) + "\n" for n in range(20)))
    assert len(load_documents(str(tmp_path / "a.ndjson"), "all")) == 20
    (tmp_path / "b.txt").write_text("磨坊在河边，" * 100)
    assert load_documents(str(tmp_path / "b.txt"), "all")


def test_a_message_without_text_never_becomes_the_word_none():
    turns = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": None},
        {"role": "tool", "content": "5"},
    ]
    assert record_text({"messages": turns}) == "user: Hi\n\ntool: 5"
    for content in ([{"type": "text", "text": "Hi"}], 5, {"a": 1}):
        with pytest.raises(ValueError, match="must be texts"):
            record_text({"messages": [{"role": "user", "content": content}]})


@pytest.mark.parametrize(
    "name", ["tokenizer_config.json", "generation_config.json", "chat_template.jinja", "model.bin"]
)
def test_every_file_of_a_model_folder_is_one(tmp_path, name):
    random_llama(64).save_pretrained(tmp_path / "model")
    (tmp_path / "model" / name).unlink(missing_ok=True)
    for make in (os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/zero"), lambda path: path.symlink_to("none")):
        make(path := tmp_path / "model" / name)
        with pytest.raises(UserError, match=name):
            load_model(str(tmp_path / "model"))
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("read", [template_named, lambda path: ServeStage(api_key_file=path)._key()])
def test_a_server_waits_for_no_pipe_and_reads_no_giant(tmp_path, read):
    os.mkfifo(tmp_path / "pipe")
    with (tmp_path / "giant").open("wb") as stream:
        stream.truncate(2**32)
    (tmp_path / "binary").write_bytes(b"\xff\xfe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for name in ("pipe", "giant", "binary", "loop", "missing", ""):
        with pytest.raises(UserError):
            read(str(tmp_path / name) if name else "")


class Tokenizer:
    """Renders by a template as transformers does."""

    def __init__(self, template):
        self.template = template

    def apply_chat_template(self, messages, tokenize, **about):
        from transformers.utils.chat_template_utils import render_jinja_template

        return render_jinja_template([messages], chat_template=self.template, **about)[0][0]


TEMPLATES = {
    "endless": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "attribute": "{{ ''.__class__.__mro__ }}",
    "undefined": "{{ nosuch.x }}",
    "raises": "{{ raise_exception('no system role, please') }}",
    "include": "{% include 'x' %}",
    "broken": "{% for %}",
    "number": 5,
    "long": "{% for a in range(60000) %}{{ 'x' * 1000 }}{% endfor %}",
    "giant": "{{ 'x' * 10 ** 10 }}",
    "giant number": "{{ 10 ** (10 ** 10) }}",
    "giant width": "{{ '%9999999999d' % 1 }}",
    "range": "{% for a in range(10 ** 9) %}{% endfor %}",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_chat_template_ends_in_time_or_is_a_sentence(monkeypatch, name):
    monkeypatch.setattr("ftp_lightning.data.template.limited", lambda today: limited(0.3))
    with pytest.raises(UserError, match="chat template"):
        rendered(Tokenizer(TEMPLATES[name]), [{"role": "user", "content": "hello"}])
    with pytest.raises(UserError, match="chat template"):
        checked("\ud800")
    assert rendered(Tokenizer("{{ messages[0].content }}!"), [{"role": "user", "content": "hello"}]) == "hello!"


DATED = "{{ strftime_now('%d %b %Y') }} {{ messages[0].content }}"


def test_a_chat_template_is_told_the_same_day_every_day():
    """What a stage finds must not depend on the day; a server's answers may."""
    turns, day = [{"role": "user", "content": "hello"}], "26 Jul 2024"
    assert rendered(Tokenizer(DATED), turns) == f"{day} hello"
    assert rendered(Tokenizer(DATED), turns, today=True) == f"{datetime.now():%d %b %Y} hello"


CONFIGS = {
    "num_hidden_layers": [10**9, 0, -1, "3", 3.5, 999], "vocab_size": [10**12, 0, 9_999_999], "hidden_size": [10**9],
    "num_attention_heads": [0, 3], "head_dim": [0, 15], "intermediate_size": [10**12], "num_labels": [10**9],
    "hidden_act": ["nosuch"], "model_type": [["llama"]], "attn_implementation": ["evil/kernel"],
    "quantization_config": [{"quant_method": "gptq", "bits": 4}, {"quant_method": "fp8"}, {"quant_method": "no"}, []],
    "dtype": [5],
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    random_llama(100).save_pretrained(folder)
    return folder


OURS = {
    "num_hidden_layers": "must be a whole number|blocks, its weights have",
    "vocab_size": "must be a whole number|, its weights have",
    "attn_implementation": "asks for the attention",
    "dtype": "must be a name",
}
"""What must be said before anything is loaded: what the libraries would do with it is slow, or fetches code."""


@pytest.mark.parametrize("key,value", [(key, value) for key, values in CONFIGS.items() for value in values])
def test_a_config_that_is_not_that_of_its_weights_is_refused(llama, key, value):
    said = json.loads((llama / "config.json").read_text())
    try:
        (llama / "config.json").write_text(json.dumps(said | {key: value}))
        with pytest.raises(UserError, match=OURS.get(key, "")):
            load_model(str(llama))
    finally:
        (llama / "config.json").write_text(json.dumps(said))


@pytest.mark.parametrize("content", [b"5", b"NaN", b"[]", b"", b"\xff\xfe", b"{", b"[" * 100_000, b" " * 5_000_000])
def test_a_config_that_is_none_is_refused(llama, content):
    said = (llama / "config.json").read_bytes()
    try:
        (llama / "config.json").write_bytes(content)
        with pytest.raises(UserError, match="config.json"):
            load_model(str(llama))
    finally:
        (llama / "config.json").write_bytes(said)


@pytest.mark.parametrize(
    "index", ["{}", "[]", '{"weight_map": {"a": "../../secret.safetensors"}}', '{"weight_map": 5}']
)
def test_an_index_names_files_of_its_own_folder(llama, index):
    place = llama / "model.safetensors.index.json"
    try:
        place.write_text(index)
        with pytest.raises(UserError, match="index.json|cannot be loaded"):
            load_model(str(llama))
    finally:
        place.unlink()


def test_what_is_published_and_exported_stays_words():
    assert [csv_cell(text) for text in ("=1+1", "@x", "-2", "+cmd|x", "plain", -2, "\n=1", "\uff1d1")] == [
        "'=1+1", "'@x", "-2", "'+cmd|x", "plain", -2, "'\n=1", "'\uff1d1",
    ]  # fmt: skip
    assert markdown_text("a|b\n# c <script> [x](y)") == r"a\|b \# c \<script\> \[x\](y)"
    assert yaml_text('x"\nlicense: mine') == '"x\\"\\nlicense: mine"'


@pytest.mark.parametrize("name", ["../../evil", "/tmp/evil", "a/b", "..", ".", "", "x" * 300, "a\nb"])
def test_the_study_that_a_sweep_names_is_one_folder(name):
    with pytest.raises(UserError, match="study|empty"):
        parse("trial", ["--study", name])


def test_a_name_is_a_path_only_if_it_can_be_one(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert named_path("~/x") == tmp_path / "x"
    for text in ("", "a\0", "~nosuchuser"):
        with pytest.raises(UserError):
            named_path(text)
