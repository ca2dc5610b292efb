"""The failure signatures: each is found where its rule holds, not found just short of it, and says what it lacks."""

import random
from pathlib import Path

import pytest
from made_up_run import BLOCKS, Page, edit, results, schedule, search_metrics, train_metrics, write_run

from ftp_lightning.report import build_report, page
from ftp_lightning.report.diagnostics import SIGNATURES, diagnose
from ftp_lightning.report.failure_rules import single_block_kl
from ftp_lightning.report.reading import PRODUCTS

IMPORTANT, HARD, DROWNED, NO_BETTER, OFF_TARGET, OVERFITTED = (signature.name for signature in SIGNATURES)


def healthy() -> dict:
    """A run in which no signature shows."""
    rng = random.Random(0)
    target = schedule(rng)
    evaluated = results(rng)
    evaluated["methods"][-1]["realised_per_block"] = target
    influence = [1.0] + [0.05] * (BLOCKS - 1)
    kl = [[0.001, 0.002, 0.003] for _ in range(BLOCKS)]
    run = dict.fromkeys(PRODUCTS) | {
        "sensitivity": {"num_blocks": BLOCKS, "levels": [0.3, 0.6, 0.9], "block_influence": influence, "kl": kl},
        "search": search_metrics(rng, 0.04), "search_schedule": {"sparsity": target}, "train": train_metrics(rng),
        "finetune": {**search_metrics(rng, 0.02), "value": 0.01}, "finetune_schedule": {"sparsity": target},
        "evaluate": evaluated,
    }  # fmt: skip
    return run


def state(run: dict, name: str) -> str:
    return next(check["state"] for check in diagnose(run)["checks"] if check["name"] == name)


def found(run: dict) -> dict[str, str]:
    return {check["name"]: check["evidence"] for check in diagnose(run)["checks"] if check["state"] == "found"}


def test_a_healthy_run_has_none_of_them():
    said = diagnose(healthy())
    assert said["summary"] == "None of 6 failure signatures found."
    assert [check["state"] for check in said["checks"]] == ["clear"] * len(SIGNATURES)


def test_important_tokens_pruned_by_the_interval_of_the_answers_kept():
    run = healthy()
    kept = run["evaluate"]["methods"][-1]["kept"]
    kept.update(share=0.86, low=0.82, high=0.9)
    assert found(run) == {}  # the interval still reaches 90 %
    kept.update(high=0.899)
    kept["by_distance"]["96-128"].update(share=0.3)
    kept["by_distance"]["0-64"].update(share=0.1, items=29)  # too few to speak of
    evidence = found(run)[IMPORTANT]
    assert "14.0 % of 2,000 answers" in evidence and "96-128 tokens back (30.0 % kept there)" in evidence


def test_a_redundant_block_pruned_too_hard_by_what_it_costs_alone():
    run = healthy()
    run["finetune_schedule"]["sparsity"][4] = 0.85
    run["sensitivity"]["kl"][4] = [0.002, 0.004, 0.005]
    assert HARD not in found(run)  # 0.00483 is less than half of 0.01
    run["sensitivity"]["kl"][4] = [0.002, 0.004, 0.0065]
    assert "block 5 (85 % skip it, KL 0.00608 by itself)" in found(run)[HARD]
    run["finetune_schedule"]["sparsity"][4] = 0.79
    assert HARD not in found(run)
    run["finetune_schedule"]["sparsity"][4] = 0.85
    run["sensitivity"]["block_influence"][4] = 1.0  # it does not look redundant
    assert HARD not in found(run)


def test_the_cost_of_a_block_is_only_compared_with_a_search_that_minimised_kl():
    run = healthy() | {"criteria": {"finetune": "accuracy"}}
    assert state(run, HARD) == "unknown"


def test_single_block_kl_is_linear_between_the_levels():
    measured = {"levels": [0.3, 0.6], "kl": [[0.3, 0.9]]}
    assert [single_block_kl(measured, 0, s) for s in (0.0, 0.15, 0.45, 0.6, 1.0)] == pytest.approx(
        [0.0, 0.15, 0.6, 0.9, 0.9]
    )


@pytest.mark.parametrize(("unmet", "share", "expected"), [(0.2, 0.05, True), (0.05, 0.05, False), (0.2, 0.2, False)])
def test_a_drowned_sparsity_loss_is_one_that_is_small_and_unmet(unmet, share, expected):
    run = healthy()
    for step in run["train"]["steps"]:
        step.update(sparsity=unmet, weighted_sparsity=unmet, weighted_guide=0.0)
        step["weighted_distillation"] = unmet * (1 - share) / share
    evidence = found(run).get(DROWNED)
    assert (evidence is not None) == expected
    if expected:
        assert evidence.startswith("sparsity is 5.0 % of the weighted loss, distillation 95.0 %")


def test_a_drowned_distillation_shows_in_validation():
    run = healthy()
    for step in run["train"]["steps"]:
        step.update(sparsity=0.0, weighted_sparsity=0.0, weighted_guide=0.95, weighted_distillation=0.05)
    assert DROWNED not in found(run)  # validation fell all the same
    for point in run["train"]["validation_kl"]:
        point["kl"] = 0.01
    evidence = found(run)[DROWNED]
    assert "distillation is 5.0 %" in evidence and "guide 95.0 %" in evidence and "never fell" in evidence


def test_a_router_that_keeps_no_more_than_the_static_one():
    run = healthy()
    static = next(method for method in run["evaluate"]["methods"] if method["name"] == "static")
    static["kept"]["share"] = run["evaluate"]["methods"][-1]["kept"]["share"]
    assert "method “static” 91.2 %" in found(run)[NO_BETTER]
    run["evaluate"]["methods"] = [m for m in run["evaluate"]["methods"] if m["name"] == "dynamic"]
    assert state(run, NO_BETTER) == "unknown"


@pytest.mark.parametrize(("off", "expected"), [(0.04, False), (0.06, True), (-0.06, True)])
def test_a_schedule_that_is_not_met(off, expected):
    run = healthy()
    realised = list(run["finetune_schedule"]["sparsity"])
    realised[5] += off
    run["evaluate"]["methods"][-1]["realised_per_block"] = realised
    assert (OFF_TARGET in found(run)) == expected
    assert not expected or "1 block off target" in found(run)[OFF_TARGET] and "block 6" in found(run)[OFF_TARGET]


def test_fine_tuning_that_helps_its_own_text_only():
    run = healthy()
    run["evaluate"]["methods"][-1]["kl"]["mean"] = 0.00144
    assert "rose from 0.00130 to 0.00144" in found(run)[OVERFITTED]
    run["evaluate"]["methods"][-1]["kl"]["mean"] = 0.00142
    assert OVERFITTED not in found(run)


def test_what_was_not_run_is_not_called_clear():
    run = healthy() | {"train": None}
    assert state(run, DROWNED) == "unknown"
    assert "1 could not be looked for" in diagnose(run)["summary"]
    states = [check["state"] for check in diagnose(dict.fromkeys(PRODUCTS))["checks"]]
    assert states == ["unknown"] * len(SIGNATURES)


def test_the_box_shows_what_was_found_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(page, "draw", lambda plot, rows: None)
    folder = write_run(tmp_path / "run", ("evaluate",))
    edit(folder / "evaluate/results.json", lambda r: r["methods"][-1]["kept"].update(share=0.4, low=0.3, high=0.5))
    shown = Page(build_report(folder))
    states = [a["class"] for tag, a in shown.tags if tag == "li" and a.get("class") in ("found", "clear", "unknown")]
    assert states[0] == "found" and states == sorted(states, key=["found", "unknown", "clear"].index)
    assert IMPORTANT in shown.text and "1,200 answers" not in shown.text and "60.0 % of 2,000 answers" in shown.text
