"""The report: shows what the stages measured, leaves out what was not run, and loads nothing from anywhere."""

import json
import math
import random
import re
from pathlib import Path
from typing import Any

import pytest
from made_up_run import BLOCKS, STAGES, Page, benchmark, edit, read_csv, results, schedule, search_metrics, write_run
from pictures import sketch

from ftp_lightning.errors import UserError
from ftp_lightning.report import (
    block_figures,
    build_report,
    figures,
    headline,
    outcome_figures,
    outcome_series,
    page,
    series,
)
from ftp_lightning.report.block_figures import runs
from ftp_lightning.report.reading import read_run
from ftp_lightning.report.sections import SECTIONS
from ftp_lightning.report.style import house_style
from ftp_lightning.report.training_figures import running_mean
from ftp_lightning.report.verdict import cautions, speed_row, verdict
from ftp_lightning.report.wording import (
    HEADLINE,
    headline_rows,
    method_labels,
    modes_text,
    noise_floor_text,
    number,
    task_rows,
)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("runs") / "first")
    assert build_report(folder) == folder / "report.html"
    return folder


@pytest.fixture
def sketched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leaves the drawing out, which takes most of the time, where only the page around it is asked for."""
    monkeypatch.setattr(page, "draw", sketch)


PLOTS = {plot.name: section for section in SECTIONS for plot in section.plots}


def test_every_figure_is_on_the_page_as_a_picture_and_as_data(run: Path) -> None:
    shown = Page(run / "report.html")
    assert {f"figure-{name}" for name in PLOTS} <= shown.ids()
    assert sum(tag == "svg" for tag, _ in shown.tags) == len(PLOTS)
    assert {path.name for path in (run / "report").iterdir()} == {
        f"{n}.{kind}" for n in PLOTS for kind in ("png", "csv")
    }
    assert all(path.read_bytes().startswith(b"\x89PNG") for path in (run / "report").glob("*.png"))
    assert {path.name for path in run.iterdir()} == {*STAGES, "report", "report.html"}  # nothing half-written is left


def test_the_csv_holds_the_numbers_of_the_input_exactly(run: Path) -> None:
    found = json.loads((run / "sensitivity/sensitivity.json").read_text())
    rows = read_csv(run / "report/sensitivity.csv")
    assert [[float(row[f"sparsity {level:g}"]) for level in found["levels"]] for row in rows] == found["kl"]
    influence = [float(row["block_influence"]) for row in read_csv(run / "report/influence.csv")]
    assert influence == found["block_influence"]
    for stage, column in (("search", "static_search"), ("finetune", "fine_tuned")):
        sparsity = json.loads((run / stage / "schedule.json").read_text())["sparsity"]
        assert [float(row[column]) for row in read_csv(run / "report/schedule.csv")] == sparsity
    methods = json.loads((run / "evaluate/results.json").read_text())["methods"]
    kept = [(row["method"], float(row["low"]), float(row["high"])) for row in read_csv(run / "report/kept.csv")]
    assert kept == [(m["name"], m["kept"]["low"], m["kept"]["high"]) for m in methods]
    steps = json.loads((run / "train/metrics.json").read_text())["steps"]
    assert [{k: float(v) for k, v in row.items()} for row in read_csv(run / "report/losses.csv")] == steps
    rows = json.loads((run / "benchmark/benchmark.json").read_text())["rows"]
    assert [{k: str(v) for k, v in row.items()} for row in rows] == read_csv(run / "report/speed.csv")


def test_the_page_loads_nothing(run: Path) -> None:
    html = (run / "report.html").read_text()
    assert "http://" not in html and "https://" not in html and "@import" not in html
    links = [value for _, attributes in Page(run / "report.html").tags for name, value in attributes.items()
             if name in ("src", "href", "xlink:href", "data", "action")]  # fmt: skip
    assert links and all(link.startswith("#") or (run / link).is_file() for link in links)


@pytest.mark.usefixtures("sketched")
@pytest.mark.parametrize("absent", STAGES)
def test_a_stage_that_was_not_run_is_left_out_with_a_sentence(absent: str, tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", tuple(stage for stage in STAGES if stage != absent))
    shown = Page(build_report(folder))
    assert [stage for stage in STAGES if f"the stage “{stage}” has not been run" in shown.text] == [absent]
    alone = {name for name, section in PLOTS.items() if set(section.needs.values()) == {absent}}
    assert not {f"figure-{name}" for name in alone} & shown.ids()
    assert {f"figure-{name}" for name in PLOTS if absent not in PLOTS[name].needs.values()} <= shown.ids()


@pytest.mark.usefixtures("sketched")
def test_a_run_without_evaluation_says_so(tmp_path: Path) -> None:
    shown = Page(build_report(write_run(tmp_path / "run", ("sensitivity",))))
    assert "has not been evaluated yet" in shown.text


def test_a_folder_that_is_no_run_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    mine = tmp_path / "report" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("years of work")
    with pytest.raises(UserError, match="holds nothing that a stage of a run has written") as refusal:
        build_report(tmp_path)
    assert len(str(refusal.value).splitlines()) <= 3
    assert sorted(tmp_path.rglob("*")) == [mine.parent, mine]


@pytest.mark.usefixtures("sketched")
def test_files_of_others_in_the_report_folder_stay(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("sensitivity",))
    mine = {folder / "report" / name for name in ("mine.txt", "kept.txt", "paper/kept.csv")}
    for path in mine:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    (folder / "report/kept.csv").write_text("of an earlier report")
    build_report(folder)
    assert all(path.read_text() == "mine" for path in mine) and not (folder / "report/kept.csv").exists()


@pytest.mark.usefixtures("sketched")
def test_a_place_that_cannot_be_written_is_the_users_error(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("sensitivity",))
    (folder / "report").write_text("a file")
    with pytest.raises(UserError, match="cannot read or write") as error:
        build_report(folder)
    assert len(str(error.value).splitlines()) <= 3 and (folder / "report").read_text() == "a file"
    (folder / "report").unlink()
    (folder / "report.html").mkdir()
    with pytest.raises(UserError, match="cannot read or write"):
        build_report(folder)
    assert not list(folder.glob(".*"))  # nothing half-written is left


@pytest.mark.usefixtures("sketched")
def test_the_facts_are_those_of_the_evaluation(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    (folder / "evaluate/config.yaml").write_text("model: tiny\ndata: questions.txt\nkv: auto\ndevice: auto\n")
    (folder / "benchmark/config.yaml").write_text("model: tiny\ndata: other.txt\nkv: auto\n")
    edit(folder / "evaluate/results.json", lambda found: [m.update(kv="evict") for m in found["methods"]])
    assert page.context(folder, page.read_run(folder), {})["facts"] == ["model tiny", "data questions.txt", "kv evict"]


def test_names_are_shown_not_run(tmp_path: Path) -> None:
    evil = "<script>alert(1)</script>"
    folder = write_run(tmp_path / "<script>run", ("evaluate", "search"))
    edit(folder / "evaluate/results.json", lambda found: found["methods"][0].update(name=evil + " $\\x$"))
    edit(folder / "evaluate/tokens.json", lambda found: found["tokens"].__setitem__(0, evil))
    edit(folder / "search/provenance.json", lambda found: found.update(command=evil))
    shown = Page(build_report(folder))
    assert [tag for tag, _ in shown.tags].count("script") == 1  # the slider's own
    assert "<script>run" in shown.text and shown.text.count(evil) >= 4  # table, figures, story, command
    assert "alert(1)" not in re.sub(r"&lt;script&gt;alert\(1\)", "", (folder / "report.html").read_text())


def test_the_verdict_states_the_measured_numbers(run: Path) -> None:
    text = Page(run / "report.html").text
    assert "29.9 % of the prompt's token-block computations are skipped; 91.2 % [90.0, 92.4] of the answers" in text
    assert "prefill of 2,048 tokens is faster than dense (1.31x [1.29, 1.34], limit 1.37x)" in text


@pytest.mark.parametrize(
    ("interval", "said"),
    [
        ((0.98, 0.99, 1.02), "No measurable difference in prefill time at 512 tokens (0.99x [0.98, 1.02]"),
        ((0.90, 0.93, 0.96), "Prefill of 512 tokens is slower than dense (0.93x [0.90, 0.96]"),
        ((1.0, 1.04, 1.06), "No measurable difference in prefill time at 512 tokens (1.04x [1.00, 1.06]"),
    ],
)
def test_speed_is_claimed_only_where_its_interval_excludes_1(interval: tuple[float, ...], said: str) -> None:
    low, speedup, high = interval
    row = {"length": 512, "batch": 1, "kv": "keep", "budget": 0.3, "flops_limit": 1.372,
           "speedup": speedup, "low": low, "high": high}  # fmt: skip
    found = {"evaluate": None, "benchmark": {"rows": [row]}}
    assert verdict(found) == f"{said}, limit 1.37x)."
    assert cautions(found) == (["Slower than dense: prefill of 512 tokens."] if high < 1 else [])


def test_the_verdict_never_quotes_the_speed_of_another_setting() -> None:
    found = {"evaluate": results(random.Random(0)), "benchmark": benchmark(random.Random(0))}
    assert speed_row(found)["batch"] == 1 and speed_row(found)["length"] == 2048
    for row in found["benchmark"]["rows"]:
        row["kv"] = "evict"
    assert speed_row(found) is None and "prefill" not in verdict(found)


def test_few_answers_and_idle_pruning_are_said_aloud() -> None:
    found = {"evaluate": results(random.Random(0)), "benchmark": None}
    assert cautions(found) == []
    found["evaluate"]["methods"][-1]["kept"]["items"] = 1999
    found["evaluate"]["methods"][-1]["realised_sparsity"] = 0.149
    assert [caution.split(":")[0] for caution in cautions(found)] == ["A quick look", "Not exercised"]


def test_starting_schedules_are_no_rivals_of_the_search() -> None:
    metrics = search_metrics(random.Random(0), 0.004)
    metrics["allocations"] |= {"start": 0.0011, "given": 0.0011}
    found = page.search_summary(metrics)
    assert (found["rival"], found["rival_kl"], found["starts"]) == ("sensitivity", 0.0032, {"start": 0.0011})
    assert found["generations"] == 30  # the first population is generation 0
    rows = [row for row in series.convergence({"finetune": metrics}, "finetune") if row["forward_tokens"] is None]
    assert [row["series"] for row in rows] == ["uniform", "ramp", "Block Influence", "sensitivity", "start"]
    metrics["allocations"]["given"] = 0.0013
    assert series.starts(metrics) == {"start": 0.0011, "second start": 0.0013}


@pytest.mark.parametrize(
    ("floor", "said", "line"),
    [
        (0.0, "KL below what can be resolved", None),
        (2.3e-5, "KL 2.30e-05", 2.3e-5),
        (1e-12, "KL 1.00e-12", None),
    ],
)
def test_the_noise_floor_says_what_it_was_measured_against(floor: float, said: str, line: float | None) -> None:
    found = results(random.Random(0))
    found["noise_floor"] = {"kl": floor, "top1": 1.0, "against": "batches of 1"}
    assert noise_floor_text(found) == f"Noise floor (dense against batches of 1): {said}."
    assert dict(zip(HEADLINE, headline_rows(found)[1]))["KL"] == ("≈ 0" if floor == 0 else number(floor))
    with house_style():
        axis = outcome_figures.kl(outcome_series.kl({"evaluate": found})).axes[0]
    dashed = [drawn.get_xdata()[0] for drawn in axis.lines if drawn.get_linestyle() == "--"]
    low, high = axis.get_xlim()
    assert axis.get_xscale() == "log" and dashed == ([] if line is None else [line])
    assert high / low < 1e5 and low < min(m["kl"]["mean"] for m in found["methods"])
    assert ("noise floor" in axis.get_title("left")) == (line is None)


def test_a_kl_of_exactly_zero_is_hollow_at_the_left_edge() -> None:
    found = results(random.Random(0))
    found["methods"][0]["kl"].update(mean=0.0, p99=0.0)
    with house_style():
        axis = outcome_figures.kl(outcome_series.kl({"evaluate": found})).axes[0]
    dots = [drawn for drawn in axis.lines if drawn.get_marker() == "o"]
    assert [dot.get_fillstyle() for dot in dots] == ["none"] + ["full"] * 4
    assert dots[0].get_xdata()[0] < min(dot.get_xdata()[0] for dot in dots[1:]) and axis.texts[0].get_text() == "0"


def test_methods_are_named_in_words_and_keep_their_keys_in_the_data() -> None:
    found = results(random.Random(0))
    found["methods"][0]["name"] = "block_influence"
    names = ["Block Influence", "uniform, static", "searched, static", "dynamic (before fine-tuning)", "dynamic"]
    rows = outcome_series.kept({"evaluate": found})
    assert [row[0] for row in headline_rows(found)[2:]] == [row["label"] for row in rows] == names
    assert [row["method"] for row in rows] == [m["name"] for m in found["methods"]]


def test_the_story_shows_every_token_with_its_decisions(run: Path) -> None:
    tokens = json.loads((run / "evaluate/tokens.json").read_text())
    shown = Page(run / "report.html")
    keeps = [attributes["data-keep"] for _, attributes in shown.tags if "data-keep" in attributes]
    assert [[int(keep[block]) for keep in keeps] for block in range(BLOCKS)] == tokens["keep"]
    assert "".join(tokens["tokens"]) in shown.text


def test_the_same_run_gives_the_same_page_and_no_leftovers(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("sensitivity",))
    before = build_report(folder).read_bytes()
    (folder / "report" / "speed.csv").write_text("of an earlier run")
    assert build_report(folder).read_bytes() == before
    assert {path.stem for path in (folder / "report").iterdir()} == {
        "sensitivity",
        "influence",
        "gradient",
        "positions",
    }


@pytest.mark.parametrize("absent", ["search_schedule", "finetune_schedule", "evaluate"])
def test_the_schedule_is_drawn_from_what_there_is(absent: str) -> None:
    rng = random.Random(0)
    run = {"search_schedule": {"sparsity": schedule(rng)}, "finetune_schedule": {"sparsity": schedule(rng)}}
    run = {**run, "evaluate": results(rng), absent: None}
    rows = series.schedules(run)
    names = {"search_schedule": "static_search", "finetune_schedule": "fine_tuned", "evaluate": "realised"}
    assert set(rows[0]) == {"block", "static_search", "fine_tuned", "realised"} - {names[absent]}
    heights = {round(bar.get_height(), 6) for bar in figures.schedules(rows).axes[0].patches}
    assert heights == {round(row[name], 6) for row in rows for name in {"static_search", "fine_tuned"} & set(row)}


def test_blocks_that_evict_are_hatched_where_others_keep() -> None:
    modes = ["keep", "evict", "keep", "evict"]
    run = {"search_schedule": {"sparsity": [0.0, 0.4, 0.5, 0.3], "kv": modes}, "finetune_schedule": None}
    rows = series.schedules({**run, "evaluate": None})
    assert [row["static_search_kv"] for row in rows] == modes
    axis = figures.schedules(rows).axes[0]
    assert [bar.get_height() for bar in axis.patches if bar.get_hatch() and bar.get_height()] == [0.4, 0.3]
    assert "hatched: evict, else keep" in [text.get_text() for text in axis.get_legend().get_texts()]
    run["search_schedule"]["kv"] = "evict"  # one mode needs no mark
    alike = figures.schedules(series.schedules({**run, "evaluate": None})).axes[0]
    assert not any(bar.get_hatch() for bar in alike.patches) and len(alike.patches) == 4


@pytest.mark.parametrize(
    ("kv", "said"),
    [
        (["evict", "keep", "keep", "evict", "evict", "keep"],
         "Skipped tokens keep their keys and values in blocks 2–3, 6 (keep), and leave no keys and values in block 5 "
         "(evict)."),
        ("keep", "Skipped tokens keep their keys and values in blocks 2–3, 5–6 (keep)."),
        (None, None),
    ],
)  # fmt: skip
def test_the_modes_of_the_blocks_are_told_in_a_sentence(kv: Any, said: str | None) -> None:
    assert modes_text({"sparsity": [0.0, 0.1, 0.2, 0.0, 0.4, 0.5]} | ({"kv": kv} if kv else {})) == said


@pytest.mark.usefixtures("sketched")
def test_the_page_tells_the_modes_of_each_schedule(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    for stage, kv in (("search", "keep"), ("finetune", ["evict", *["keep"] * 10, "evict"])):
        path = folder / stage / "schedule.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"kv": kv}))
    page = build_report(folder).read_text(encoding="utf-8")
    assert "<b>Static search</b>: Skipped tokens keep their keys and values in blocks 2–12 (keep)." in page
    assert "and leave no keys and values in block 12 (evict)." in page and "Hatched:" in page


def test_kl_of_exactly_zero_is_on_the_axis() -> None:
    rows = [{"block": block, "sparsity 0.3": kl} for block, kl in ((1, 0.02), (2, 0.0003), (3, 0.0))]
    with house_style():
        axis = figures.sensitivity(rows).axes[0]
    assert axis.get_ylim()[0] == 0 and list(axis.get_yticks()) == [0, 0.0005, 0.001, 0.002, 0.005, 0.01, 0.02]


def test_the_terminal_table_is_aligned_and_complete() -> None:
    found = results(random.Random(0))
    lines = headline(found).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [line.split("  ")[0] for line in lines[2:]] == [
        "dense",
        "noise floor",
        *(label for _, label in method_labels(found)),
    ]
    assert "91.2 % [90.0, 92.4]" in lines[-1] and "91.2" not in "".join(lines[:-1])


def test_scores_without_meaning_are_marked() -> None:
    rows = {row["task"]: row for row in task_rows(results(random.Random(0)))}
    assert [rows[task]["measures"] for task in ("recall", "names", "coin")] == [True, True, False]
    assert {cell["skill"] for cell in rows["coin"]["cells"]} == {"–"}


def test_labels_name_what_differs_and_nothing_else() -> None:
    found = results(random.Random(0))
    found["methods"][0]["budget"] = 0.1 + 0.2  # 0.30000000000000004
    assert [label for _, label in method_labels(found)][:3] == ["random tokens", "uniform, static", "searched, static"]
    found["methods"][0].update(budget=0.5, kv="evict")
    assert [label for _, label in method_labels(found)][:2] == ["random tokens 50 % evict", "uniform, static 30 % keep"]


@pytest.mark.usefixtures("sketched")
def test_methods_without_recall_items_are_dashes(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    edit(folder / "evaluate/results.json", lambda found: [m.update(kept=None) for m in found["methods"]])
    shown = Page(build_report(folder))
    assert "figure-kept" not in shown.ids() and "figure-kl" in shown.ids() and "answers that need" not in shown.text


def test_numbers_read_well() -> None:
    values = (None, math.nan, 0.0, 9.4185, 0.0009, 1234.5, 2.3e-5)
    assert [number(value) for value in values] == ["–", "–", "0", "9.42", "0.000900", "1,234", "2.30e-05"]


def test_running_mean_looks_back_only() -> None:
    assert running_mean([4.0, 0.0, 2.0, 6.0], 2) == [4.0, 2.0, 1.0, 4.0]


def test_broken_files_name_themselves(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", ("search",))
    (folder / "search/metrics.json").write_text("{")
    with pytest.raises(UserError, match="search/metrics.json is not valid JSON"):
        build_report(folder)
    with pytest.raises(UserError, match="is not a folder"):
        build_report(tmp_path / "nowhere")


ALONG_X = {"kl", "kept"}
"""Figures whose values lie along the horizontal axis."""


def test_a_chart_that_hides_its_zero_says_so(tmp_path: Path) -> None:
    found = read_run(write_run(tmp_path / "run"))
    for plot in (plot for section in SECTIONS for plot in section.plots):
        with house_style():
            drawn = plot.draw(plot.rows(found))
        for axis in drawn.axes:
            values = ("x",) if plot.name in ALONG_X else ("y",)
            for limits, label in ((getattr(axis, f"get_{v}lim")(), getattr(axis, f"get_{v}label")()) for v in values):
                assert min(limits) <= 0 <= max(limits) or "no zero" in label or plot.name == "gates", (plot.name, label)
            assert axis.get_xlabel() or axis.get_title() or not axis.xaxis.get_visible() or len(drawn.axes) > 1


def test_the_gate_map_shows_every_decision(tmp_path: Path) -> None:
    rows = outcome_series.gates(read_run(write_run(tmp_path / "run", ("evaluate",))))
    tokens = json.loads((tmp_path / "run/evaluate/tokens.json").read_text())
    assert [[row[f"block_{block + 1}"] for row in rows] for block in range(BLOCKS)] == tokens["keep"]
    assert runs([1, 1, 0, 1, 0, 0, 1, 1, 1]) == [(1, 2), (4, 1), (7, 3)] and runs([0, 0]) == []
    drawn = block_figures.gates(rows).axes[1]
    areas = [abs(polygon_area(patch.get_path().vertices)) for patch in drawn.patches]
    assert [round(area / 0.8) for area in areas] == [sum(keep) for keep in tokens["keep"] if sum(keep)]


def polygon_area(corners: Any) -> float:
    """Summed area of closed boxes of five corners each."""
    boxes = [corners[start : start + 5] for start in range(0, len(corners), 5)]
    return sum((box[:, 0].max() - box[:, 0].min()) * (box[:, 1].max() - box[:, 1].min()) for box in boxes)


def test_the_headline_table_has_the_measured_time_of_what_was_clocked(run: Path) -> None:
    table = page.headline_table(read_run(run))
    times = {row[0]: row[-1] for row in table}
    assert page.headline_columns(read_run(run))[-1] == "prefill, 2,048 tokens"
    assert times["dense"] == "228 ms" and times["dynamic"] == "174 ms (1.31x)" and times["random tokens"] == "–"


@pytest.mark.usefixtures("sketched")
def test_own_answers_are_shown_with_their_intervals(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run")
    own = {"share": 0.62, "low": 0.55, "high": 0.69, "items": 200, "note": ""}
    own |= {"first": {"share": 0.9, "low": None, "high": None, "note": "one document: no interval"}}
    own |= {"kl": {"mean": 0.0213, "low": 0.0151, "high": 0.0274}}
    edit(folder / "evaluate/results.json", lambda found: found["methods"][-1].update(own_answers=own))
    build_report(folder)
    shown = Page(folder / "report.html")
    for words in ("whole answers kept", "62.0 % [55.0, 69.0]", "90.0 % (one document: no interval)"):
        assert words in shown.text
    assert "0.0213 [0.0151, 0.0274]" in shown.text and "word for word" in shown.text


def test_the_best_are_those_that_nobody_beats_in_both() -> None:
    rows = [{"flops_cut": cut, "share": share} for cut, share in ((0.0, 1.0), (0.3, 0.9), (0.3, 0.5), (0.4, 0.2))]
    assert [row["best"] for row in outcome_series.with_best(rows)] == [1, 1, 0, 1]


def test_commands_are_told_in_order(run: Path) -> None:
    shown = Page(run / "report.html")
    assert "\n".join(f"ftp-lightning {stage} --seed 0" for stage in STAGES) in shown.text
