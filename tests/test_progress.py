"""The time left that a chain promises, against the seconds that both demos took on two free cores."""

import io

import pytest

from ftp_lightning.__main__ import parse
from ftp_lightning.cli.progress import Progress
from ftp_lightning.stages.run import RunStage
from ftp_lightning.stages.run_work import REPORT, evaluated, searched, shares

# Seconds from the start, and the step that was just done: a generation, a step of training, the methods evaluated.
EMBEDDED = {
    "sensitivity": {10: 1},
    "search": {22: 0, 32: 4},
    "train": {46: 1, 56: 13, 67: 25, 77: 38, 88: 51},
    "finetune": {108: 0},
    "static": {128: 0},
    "evaluate": {144: 0, 159: 1, 173: 3, 184: 5},
    "benchmark": {199: 0},
}
REAL = {
    "sensitivity": {108: 1},
    "search": {160: 0, 176: 2, 190: 4},
    "train": {218: 1, 270: 9, 332: 19, 392: 29, 454: 39},
    "finetune": {530: 0, 547: 2},
    "static": {604: 0, 615: 1, 631: 3},
    "evaluate": {677: 0, 742: 1, 771: 2, 805: 3, 837: 4, 868: 5},
    "benchmark": {912: 0},
}


def done(stage: str, settings, step: int) -> tuple[float, float]:
    """What the stage tells its progress at this step."""
    if stage in ("search", "finetune", "static"):
        return searched(settings, step), searched(settings, settings.generations)
    if stage == "evaluate":
        methods = len(settings.compare) + 2
        return evaluated(settings, methods, step), evaluated(settings, methods)
    return step, settings.steps if stage == "train" else 1


def promised(config: str, blocks: int, recorded: dict, finished: tuple[str, ...] = ()) -> list[tuple[int, str, float]]:
    """(second, stage, seconds left by our line) of all lines of a run whose stages `finished` were done before."""
    stages = parse("run", ["--config", config, "--processes", "2"]).stages()
    share, before, skipped, found = shares(stages, blocks), 0.0, 0.0, []
    for stage, lines in recorded.items():
        for second, step in () if stage in finished else lines.items():
            progress = Progress(stage, before, share[stage], 0.0, finished_before=skipped, after=REPORT)
            one, whole = done(stage, stages[stage], step)
            left = progress._left(float(second), one / whole)
            if left is not None:
                found.append((second, stage, left))
        before += share[stage]
        skipped += share[stage] if stage in finished else 0.0
    return found


@pytest.mark.parametrize(
    ("config", "blocks", "recorded", "whole"), [("demo", 12, EMBEDDED, 223), ("demo_real", 30, REAL, 1010)]
)
def test_the_time_left_is_right_within_30_per_cent(config, blocks, recorded, whole):
    lines = promised(f"experiments/{config}.yaml", blocks, recorded)
    wrong = [f"{stage}, {second} s: {left:.0f} s left, not {whole - second}" for second, stage, left in lines
             if abs(left - (whole - second)) > 0.3 * (whole - second)]  # fmt: skip
    assert len(lines) >= 15 and not wrong


def test_what_was_finished_before_is_no_measure_of_the_speed():
    """The same run, begun anew at its evaluation: 677 - 631 seconds after the start its dense questions begin."""
    resumed = REAL | {"evaluate": {677 - 631: 0}, "benchmark": {912 - 631: 0}}
    finished = ("sensitivity", "search", "train", "finetune", "static")
    lines = promised("experiments/demo_real.yaml", 30, resumed, finished)
    assert [stage for *_, stage, _ in lines] == ["evaluate", "benchmark"]
    assert all(left == pytest.approx(1010 - 631 - second, rel=0.3) for second, _, left in lines)


def shown(now: float, **about) -> str:
    stream = io.StringIO()
    progress = Progress("tune", started=0.0, stream=stream, now=lambda: now)
    progress.step(30, 100, "fitting", **about)
    return stream.getvalue()


def test_a_line_says_what_is_left_at_most_where_a_stage_has_a_limit():
    assert shown(60.0) == "tune: fitting, 1 min 00 s, about 2 min 20 s left\n"
    assert shown(60.0, at_most=70.0) == "tune: fitting, 1 min 00 s, at most 1 min 10 s left\n"
    assert shown(60.0, at_most=-1.0) == "tune: fitting, 1 min 00 s, at most 0 s left\n"


def test_the_chain_knows_which_stages_were_finished(tmp_path, monkeypatch):
    seen = []

    def execute(self, progress=None):
        seen.append((self.stage, progress.finished_before, progress.after))
        if self.stage in ("sensitivity", "search"):
            progress.done_already("done already")

    stages = RunStage(model="random:tiny", output=str(tmp_path)).stages()
    for stage in stages.values():
        monkeypatch.setattr(type(stage), "execute", execute)
    monkeypatch.setattr("ftp_lightning.stages.run_inputs.check_inputs", lambda stages: 3)
    monkeypatch.setattr("ftp_lightning.stages.run.gains", lambda *about: [])
    monkeypatch.setattr("ftp_lightning.report.build_report", lambda folder: folder)
    monkeypatch.setattr("ftp_lightning.report.headline", lambda results: "")
    monkeypatch.setattr("ftp_lightning.stages.run.read_product", lambda *about: {})
    RunStage(model="random:tiny", output=str(tmp_path)).execute()
    share = shares(stages, 3)
    finished = [0.0, share["sensitivity"], *[share["sensitivity"] + share["search"]] * 2]
    assert [before for _, before, _ in seen[:4]] == pytest.approx(finished)
    assert all(after == REPORT for *_, after in seen)
