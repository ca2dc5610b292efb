"""A model on several devices, or partly on disk, is the same model; what cannot be spread is refused."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from families import family

from ftp_lightning import Schedule, TokenPruner, UserError
from ftp_lightning.__main__ import parse
from ftp_lightning.models import load_model, model_identity
from ftp_lightning.pruning.devices import fetched, home, hooks_of
from ftp_lightning.routing import make_router

HERE = Path(__file__).resolve().parent
SCHEDULE = Schedule([0.0, 0.3, 0.6, 0.4])
IDS = torch.randint(3, 64, (2, 24), generator=torch.Generator().manual_seed(5))
ON_DISK = {
    "model.embed_tokens": "cpu", "model.rotary_emb": "cpu", "model.norm": "cpu", "lm_head": "cpu",
    **{f"model.layers.{block}": "disk" if block % 2 else "cpu" for block in range(4)},
}  # fmt: skip


@pytest.fixture(scope="module", params=["llama", "llama_tied_biased"])
def stored(request, tmp_path_factory):
    """(folder of a model, device map file): half of its blocks wait on disk, in the very files they are stored in."""
    folder = tmp_path_factory.mktemp(request.param)
    family(request.param, torch.float32).save_pretrained(folder)
    (folder / "map.json").write_text(json.dumps(ON_DISK))
    return str(folder), str(folder / "map.json")


def computed(model, router, **how):
    """What a pruner computes: prompt, continuation, generation, and a training forward with the router's gradient."""
    pruner = TokenPruner(router, SCHEDULE, **how)
    with torch.no_grad(), pruner(model):
        prompt = model(IDS, use_cache=True)
        yield from (prompt.logits, *pruner.trace.keep)
        yield model(IDS[:, :5], past_key_values=prompt.past_key_values).logits
        yield model.generate(IDS[:1], max_new_tokens=4, do_sample=False)
    router.zero_grad()
    with pruner(model), pruner.masked(16, recompute=True):
        logits = model(IDS, use_cache=False).logits
        logits.square().mean().backward()
    yield from (logits, *(weight.grad for weight in router.parameters()))


def test_weights_that_wait_on_disk_change_no_bit(stored):
    folder, device_map = stored
    whole, spread = load_model(folder), load_model(folder, device_map=device_map)
    waiting = [name for name, weight in spread.named_parameters() if weight.is_meta]
    assert len(waiting) >= 10 and not any(map(hooks_of, whole.modules()))
    assert home(spread) == torch.device("cpu") and model_identity(spread) == model_identity(whole)
    weight = dict(whole.named_parameters())[waiting[-1]]
    assert torch.equal(fetched(spread, waiting[-1], dict(spread.named_parameters())[waiting[-1]]), weight)
    torch.manual_seed(1)
    router = make_router("dynamic", 4, 32)
    for how in ({"kv": "evict"}, {"kv": "keep", "decode": "strict"}):
        for one, other in zip(list(computed(whole, router, **how)), list(computed(spread, router, **how)), strict=True):
            assert torch.equal(one, other)


def spread_over(first, second, cases, names="llama"):
    """`spread_over_two_devices.py` in a process of its own; returns what went wrong."""
    script = [sys.executable, str(HERE / "spread_over_two_devices.py"), first, second, cases, names]
    done = subprocess.run(script, cwd=HERE, capture_output=True, text=True)
    return [] if done.returncode == 0 else done.stderr.strip().splitlines()[-1:]


def test_two_devices_compute_what_one_computes():
    assert spread_over("cpu", "far:0", "inference,training") == []


@pytest.mark.slow
@pytest.mark.parametrize("names", ["llama,gpt2", "opt,gemma2"])
@pytest.mark.parametrize("devices", [("cpu", "far:0"), ("far:0", "cpu")])
def test_every_router_and_family_on_two_devices(devices, names):
    assert spread_over(*devices, "ways,training,routers,search,sensitivity", names) == []


@pytest.mark.slow
def test_the_device_that_is_not_there_guards():
    """A tensor left behind on the first device is an error, as it would be with a GPU."""
    spoilt = "import spread_over_two_devices as s; from ftp_lightning.pruning.forward import Forward\n"
    spoilt += "Forward.go_to = lambda self, place: None\ns.main(('cpu', 'far:0'), ['inference'], ['llama'])"
    found = subprocess.run([sys.executable, "-c", spoilt], cwd=HERE, capture_output=True, text=True)
    assert found.returncode and "on far:0 and on the CPU" in found.stderr.strip().splitlines()[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("devices", [("cpu", "cuda:0"), ("cuda:0", "cpu"), ("cuda:0", "cuda:1")])
def test_gpus_and_a_cpu_compute_what_one_cpu_computes(devices):
    if torch.cuda.device_count() < len([device for device in devices if device != "cpu"]):
        pytest.skip(f"{devices} are not there")
    assert spread_over(*devices, "ways,training,routers,search,sensitivity") == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["sensitivity", "search", "train", "evaluate"])
def test_a_stage_finds_the_same(stage, command, tmp_path):
    """The embedded model, every third block on disk."""
    blocks = {f"model.layers.{block}": "disk" if block % 3 == 1 else "cpu" for block in range(12)}
    rest = {name: place for name, place in ON_DISK.items() if "layers" not in name}
    (tmp_path / "map.json").write_text(json.dumps(rest | blocks))
    sizes = {
        "sensitivity": ["--windows=2", "--levels=0.5"],
        "search": ["--windows=2", "--generations=1"],
        "train": ["--budget=0.3", "--steps=2", "--batch_size=2", "--validations=1", "--validation_windows=2"],
        "evaluate": ["--windows=2", "--tasks=story_recall", "--items=4", "--budget=0.3"],
    }[stage]
    product = {"search": "schedule.json", "train": "pruned/router.safetensors", "evaluate": "results.json"}
    for name, more in (("whole", ()), ("spread", ("--device_map", tmp_path / "map.json"))):
        status, _, err = command(stage, *sizes, "--tracking=none", "--output", tmp_path / name, *more)
        assert status == 0, err
    for file in ("metrics.json", product.get(stage, "sensitivity.json")):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "spread" / file).read_bytes()


REFUSED = [
    ("benchmark", ["--device_map=auto"], "works on one device only"),
    ("trial", ["--device_map=auto"], "works on one device only"),
    ("search", ["--device_map=auto", "--device=cpu"], "--device cannot be combined with --device_map"),
    ("search", ["--device_map=auto", "--processes=2"], "--processes needs one for each process"),
    ("train", ["--device_map=auto", "--shard"], "both place the blocks"),
    ("train", ["--shard", "--budget=0.3", "--steps=1", "--model=random:tiny"], "--shard needs more than one process"),
    ("trial", ["--shard"], "works on one device only"),
    ("search", ["--device_map=nowhere"], "not a JSON file"),
]


@pytest.mark.parametrize(("stage", "words", "said"), REFUSED)
def test_what_does_not_go_together_is_refused(stage, words, said, command, tmp_path):
    status, _, err = command(stage, *words)
    assert status == 2 and said in err and len(err.strip().splitlines()) <= 3
    assert not (tmp_path / "runs" / stage / "provenance.json").exists()


def test_maps_that_are_none_are_refused(tmp_path):
    for text in ("[]", "{}", '{"model": true}', '{"model": -1}', "{"):
        (tmp_path / "map.json").write_text(text)
        with pytest.raises(UserError, match="device map|not a JSON"):
            load_model("random:tiny", device_map=str(tmp_path / "map.json"))
    (tmp_path / "map.json").write_text('{"model": "disk", "lm_head": "cpu"}')
    with pytest.raises(UserError, match="cannot be spread so"):
        load_model("random:tiny", device_map=str(tmp_path / "map.json"))


def test_one_weight_lies_in_one_place(tmp_path):
    family("llama_tied_biased", torch.float32).save_pretrained(tmp_path)
    (tmp_path / "map.json").write_text(json.dumps(ON_DISK | {"lm_head": "disk"}))
    with pytest.raises(UserError, match="are one weight"):
        load_model(str(tmp_path), device_map=str(tmp_path / "map.json"))


def test_where_all_fits_one_device_auto_changes_nothing():
    whole, spread = load_model("random:tiny"), load_model("random:tiny", device_map="auto")
    assert all(torch.equal(one, other.cpu()) for one, other in zip(whole.parameters(), spread.parameters()))


def test_the_chain_leaves_the_benchmark_out():
    assert "benchmark" not in parse("run", ["--device_map=auto"]).stages()
    assert "benchmark" in parse("run", []).stages()
