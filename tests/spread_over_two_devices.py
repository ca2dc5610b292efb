"""A model dispatched over two devices gives the numbers of the same model on one: `python spread_over_two_devices.py
FIRST SECOND CASE,... FAMILY,...`. far:0 is not there (`far_device`). Run by tests/test_device_map.py."""

import sys

import far_device
import torch
from families import family

from ftp_lightning import Schedule, StaticRouter, TokenPruner
from ftp_lightning.data.rows import Rows, moved
from ftp_lightning.evaluation.continuation import evaluate_rows
from ftp_lightning.lit.block_sensitivity import BlockSensitivity
from ftp_lightning.lit.router_training import RouterTraining
from ftp_lightning.lit.training_settings import TrainingSettings
from ftp_lightning.models import model_identity
from ftp_lightning.pruning.devices import home
from ftp_lightning.pruning.family import find_blocks
from ftp_lightning.routing import make_router
from ftp_lightning.search.criteria import HiddenError
from ftp_lightning.search.fitness import ContinuationFitness
from ftp_lightning.training.compensation import fit_compensation

SCHEDULE = Schedule([0.0, 0.3, 0.6, 0.4])
GENERATOR = torch.Generator().manual_seed(5)
IDS = torch.randint(3, 64, (2, 24), generator=GENERATOR)
PADDED = torch.ones_like(IDS).index_fill(1, torch.arange(3), 0)
WINDOWS = Rows.even(torch.randint(3, 64, (4, 20), generator=GENERATOR), 14, ["plain"] * 4, [0] * 4)
PLAIN = {"kv": "evict"}
WAYS = [
    PLAIN,
    {"kv": "keep", "decode": "strict"},
    {"kv": "evict", "choice": "threshold", "decode": "threshold", "attention": "exact"},
    {"kv": "keep", "parts": "attention+mlp"},
]
ROUTERS = ("static", "random", "dynamic", "local", "recurrent", "hidden+factors", "one_pass", "projected_once")


def on_two(name: str, devices: tuple[str, str]):
    """The model with its first half and the way in on the first device, the rest on the second."""
    from accelerate import dispatch_model

    model = family(name, torch.float64)
    blocks = list(find_blocks(model))
    where, last = {}, ("norm", "ln_f") if model.config.tie_word_embeddings else ("norm", "ln_f", "lm_head")

    def place(module, path):
        if module in blocks or not any(child in blocks for child in module.modules()):
            late = blocks.index(module) >= 2 if module in blocks else path.endswith(last)
            where[path] = devices[late]
            return
        for child, inner in module.named_children():
            place(inner, f"{path}.{child}" if path else child)

    place(model, "")
    main = "cpu" if "cpu" in devices else None  # else accelerate takes a CPU for a place to wait in
    dispatch_model(model, where, main_device=main, skip_keys=model._skip_keys_device_placement)
    assert {str(weight.device) for weight in model.parameters()} == set(devices)
    return model


def inference(model, place, router="dynamic", **how):
    """Prompt, continuation, second routed chunk, padding, greedy and beam search; and what was decided."""
    torch.manual_seed(1)
    pruner, ids, mask = TokenPruner(make_router(router, 4, 32), SCHEDULE, **how), IDS.to(place), padding(model, place)
    with torch.no_grad(), pruner(model):
        prompt = model(ids, use_cache=True)
        yield from (prompt.logits, *pruner.trace.keep, torch.tensor(pruner.trace.sparsity))
        yield model(ids[:, :5], past_key_values=prompt.past_key_values).logits
        with pruner.prompt():
            yield model(ids[:, :7], past_key_values=prompt.past_key_values).logits
        yield model(ids, attention_mask=mask).logits[:, 3:]
        yield model.generate(ids[:1], max_new_tokens=5, do_sample=False)
        yield model.generate(ids, attention_mask=mask, max_new_tokens=4, num_beams=2, do_sample=False)


def training(model, place, **settings):
    """Every loss, and the router's gradient."""
    torch.manual_seed(1)
    pruner = TokenPruner(make_router(settings.pop("router", "dynamic"), 4, 32), SCHEDULE, kv=settings.pop("kv", "keep"))
    system = RouterTraining(model, pruner, TrainingSettings(batch_size=2, **settings))
    batch = {"input_ids": IDS.to(place), "prompt_tokens": 16}
    if not settings:
        batch["attention_mask"] = padding(model, place)
    loss = system.training_step(batch, 0)
    loss.backward()
    gradients = [weight.grad for weight in pruner.router.parameters()]  # None: of a block that is dense, in `local`
    yield from (loss, torch.tensor([g is None for g in gradients]), *(g for g in gradients if g is not None))


def search(model, place):
    """The loss of a schedule that starts above dense blocks, by the last state as by KL; a compensation; a KL."""
    for criterion in (None, HiddenError()):
        fitness = ContinuationFitness(model, WINDOWS, lambda s: TokenPruner(StaticRouter(), s, kv="keep"), 2, criterion)
        yield torch.tensor([fitness(Schedule([0.0, 0.0, 0.4, 0.8])), fitness(SCHEDULE)])
    fitted = fit_compensation(model, WINDOWS, rank=2)
    yield from fitted.tensors.values()
    pruner = TokenPruner(make_router("random", 4, 32), SCHEDULE, kv="keep", skip="low-rank", compensation=fitted)
    yield torch.tensor(evaluate_rows(model, WINDOWS, pruner, batch_size=2).kl_rows)


def sensitivity(model, place):
    makers = {kv: lambda s, kv=kv: TokenPruner(StaticRouter(), s, kv=kv) for kv in ("keep", "evict")}
    system = BlockSensitivity(model, makers, 4, (0.3, 0.6), prompt_tokens=14).to(place)
    system._measure(moved(WINDOWS.batch(range(4)), place))
    yield system.kl.compute()
    yield from (system.cosine.compute(), system.saliency.compute())


def padding(model, place):
    """Rows that begin with padding; none for Gemma 2, whose stock forward makes NaN of them in float64."""
    return (torch.ones_like(PADDED) if model.config.model_type == "gemma2" else PADDED).to(place)


def cases_of(first):
    """What is computed twice, by name. first: where routers decide; the device that is not there has no GRU."""
    routers = [name for name in ROUTERS if name != "recurrent" or first != far_device.NAME]
    trained = [name for name in routers if name not in ("static", "random")]
    return {
        "inference": [inference],
        "training": [training, lambda m, p: training(m, p, distillation="kl", guide="future", recompute=True)],
        "search": [search],
        "sensitivity": [sensitivity],
        "ways": [lambda m, p, r=r, w=w: inference(m, p, r, **w) for r in routers for w in WAYS],
        "routers": [lambda m, p, r=r: training(m, p, router=r, kv="evict", gates="gumbel") for r in trained],
    }


def check(devices: tuple[str, str], cases: list[str], names: list[str]) -> None:
    for name in names:
        near, spread = family(name, torch.float64), on_two(name, devices)
        assert model_identity(near) == model_identity(spread) and home(spread) == torch.device(devices[0])
        near.config.pad_token_id = spread.config.pad_token_id = None  # else a stock warning looks for it in the prompt
        for case in [case for wanted in cases for case in cases_of(devices[0])[wanted]]:
            for one, other in zip(list(case(near, "cpu")), list(case(spread, devices[0])), strict=True):
                one, other = one.detach().double(), other.detach().to("cpu").double()
                worst = (one - other).abs().max().item()
                assert worst <= 1e-6 * one.abs().max().item(), (name, cases, worst)


def main(devices: tuple[str, str], cases: list[str], names: list[str]) -> None:
    torch.set_num_threads(1)
    if far_device.NAME not in devices:
        return check(devices, cases, names)
    far_device.register()
    with far_device.Making():
        check(devices, cases, names)
    assert set(far_device.crossings) == {devices, devices[::-1]}


if __name__ == "__main__":
    first, second, cases, names = sys.argv[1:]
    main((first, second), cases.split(","), names.split(","))
