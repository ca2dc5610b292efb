"""An exported folder prunes under stock transformers: by `from_pretrained`, by `custom_generate`, and served."""

import os
import subprocess
import sys
import time
from pathlib import Path

import httpx
import pytest
from served import embedded

from ftp_lightning import Schedule, StaticRouter, TokenPruner, UserError
from ftp_lightning.models import load_model

PROMPT = "the fisherman went home to his wife and told her of the golden fish that could speak and " * 3
PRUNER = TokenPruner(StaticRouter(), Schedule.default(12, 0.6))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    from ftp_lightning.serving.export import export

    folder = tmp_path_factory.mktemp("exported")
    os.environ["HF_MODULES_CACHE"] = str(folder / "modules")
    PRUNER.save(folder / "pruned", base="embedded", model=load_model("embedded"))
    return export(str(folder / "pruned"), str(folder / "hf"))


@pytest.fixture(scope="module")
def loaded(exported):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(exported, trust_remote_code=True, dtype="float32")
    return model, AutoTokenizer.from_pretrained(exported)


def wanted(pruner, ids, new=8):
    model = embedded()[0]
    if pruner is None:
        return model.generate(**ids, max_new_tokens=new, do_sample=False).tolist()
    with pruner(model):
        return model.generate(**ids, max_new_tokens=new, do_sample=False).tolist()


def test_from_pretrained_prunes_by_the_budget_that_is_asked_for(loaded):
    from transformers import GenerationConfig

    model, tokenizer = loaded
    ids = tokenizer(PROMPT, return_tensors="pt")
    asked = {"max_new_tokens": 8, "do_sample": False}
    pruned, less = (
        wanted(PRUNER, ids),
        wanted(
            PRUNER.changed(schedule=Schedule([s / 2 for s in PRUNER.schedule.sparsity], kv=PRUNER.schedule.kv)), ids
        ),
    )
    assert model.generate(**ids, **asked).tolist() == pruned != wanted(None, ids)
    assert model.generate(**ids, **asked, ftp_budget=0).tolist() == wanted(None, ids)
    assert model.generate(**ids, **asked, ftp_budget=0.3).tolist() == less
    config = GenerationConfig(**asked, ftp_budget=0.3)
    assert model.generate(**ids, generation_config=config).tolist() == less
    assert model.generate(**ids, **asked).tolist() == pruned, "the budget of one call stays with it"
    with pytest.raises(UserError, match="at most 0.6"):
        model.generate(**ids, **asked, ftp_budget=0.7)
    with pytest.raises(UserError, match="dynamic"):
        model.generate(**ids, **asked, cache_implementation="static")


def test_custom_generate_prunes_a_model_that_was_loaded_from_elsewhere(exported):
    model, tokenizer = embedded()
    ids = tokenizer(PROMPT, return_tensors="pt")
    asked = {"max_new_tokens": 8, "do_sample": False}
    found = model.generate(**ids, **asked, custom_generate=str(exported), trust_remote_code=True)
    assert found.tolist() == wanted(PRUNER, ids) and "generate" not in model.__dict__


def test_a_pipeline_prunes(loaded):
    from transformers import pipeline

    model, tokenizer = loaded
    speak = pipeline("text-generation", model=model, tokenizer=tokenizer)
    ids = tokenizer(PROMPT, return_tensors="pt")
    text = speak(PROMPT, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert text == tokenizer.decode(wanted(PRUNER, ids)[0], skip_special_tokens=True)


def test_the_folder_holds_what_a_user_needs(exported):
    names = {path.relative_to(exported).as_posix() for path in exported.rglob("*") if path.is_file()}
    assert names >= {"config.json", "model.safetensors", "tokenizer.json", "pruner.json", "router.safetensors",
                     "custom_generate/generate.py", "custom_generate/requirements.txt", "README.md"}  # fmt: skip
    card = (exported / "README.md").read_text()
    for trap in ("--continuous-batching", "--compile", "422", "trust_remote_code"):
        assert trap in card
    assert len((exported / "custom_generate/generate.py").read_text().splitlines()) < 15


def test_weights_are_linked_where_that_is_asked_for(exported, command, tmp_path):
    status, out, err = command("export", "--pruned", exported.parent / "pruned", "--output", "hf", "--link")
    assert status == 0, err
    assert (tmp_path / "hf/model.safetensors").is_symlink() and (tmp_path / "hf/model.safetensors").exists()
    assert command("export", "--pruned", exported.parent / "pruned", "--output", "hf")[0] == 2
    assert command("export", "--pruned", exported.parent / "pruned", "--output", "hf", "--overwrite")[0] == 0
    assert not (tmp_path / "hf/model.safetensors").is_symlink()


def test_a_ready_made_pruner_is_exported_by_its_name(command, tmp_path):
    from ftp_lightning.disk.ready import load_pruner

    status, out, err = command("export", "--pruned", "embedded", "--output", "hf", "--link")
    assert status == 0, err
    stored, ready = TokenPruner.load(tmp_path / "hf"), load_pruner("embedded")
    assert stored.schedule == ready.schedule and stored.family == ready.family


def test_what_cannot_be_exported_is_said(exported, command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/notes").write_text("x")
    TokenPruner(StaticRouter(), PRUNER.schedule).save(tmp_path / "nameless")
    pruned = exported.parent / "pruned"
    for flags, words in (
        ([], "needs a pruner"),
        (["--pruned", "nowhere", "--output", "x"], "not a pruner"),
        (["--pruned", pruned, "--output", "mine"], "is not an export"),
        (["--pruned", "nameless", "--output", "x"], "names no base"),
        (["--pruned", pruned, "--output", "x", "--model", "random:tiny"], "another base model"),
        (["--pruned", "nameless", "--output", "x", "--model", "random:tiny"], "12 blocks"),
    ):
        status, _, err = command("export", *flags)
        assert status == 2 and words in err, err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "nameless"]


@pytest.mark.slow
def test_stock_transformers_serves_the_folder_pruned(exported, tmp_path):
    program = Path(sys.executable).parent / "transformers"
    port = 18_000 + os.getpid() % 2000
    command = [program, "serve", str(exported), "--trust-remote-code", "--port", str(port), "--dtype", "float32"]
    with (tmp_path / "log").open("w") as log:
        server = subprocess.Popen(list(map(str, command)), stdout=log, stderr=log)
    try:
        url, tokenizer = f"http://localhost:{port}", embedded()[1]
        for _ in range(600):
            try:
                httpx.get(f"{url}/health")
                break
            except httpx.TransportError:
                assert server.poll() is None, (tmp_path / "log").read_text()[-2000:]
                time.sleep(0.2)
        body = {"model": str(exported), "prompt": PROMPT, "max_tokens": 8, "temperature": 0.0}
        ids = tokenizer(PROMPT, return_tensors="pt")

        def said(**more):
            answer = httpx.post(f"{url}/v1/completions", json=body | more, timeout=120)
            assert answer.status_code == 200, answer.text
            return answer.json()["choices"][0]["text"]

        def text(pruner):
            return tokenizer.decode(wanted(pruner, ids)[0][ids["input_ids"].shape[1] :], skip_special_tokens=True)

        assert said() == text(PRUNER)
        assert said(generation_config='{"ftp_budget": 0, "do_sample": false}') == text(None)
        assert httpx.post(f"{url}/v1/completions", json=body | {"ftp_budget": 0.1}, timeout=60).status_code == 422
    finally:
        server.terminate()
        server.wait(30)
