"""Builds the report of one run: reads the stages' folders, draws the figures, renders one self-contained page."""

import csv
import io
from base64 import b64encode
from hashlib import sha256
from pathlib import Path
from typing import Any

from ftp_lightning.cells import csv_cell
from ftp_lightning.report import wording
from ftp_lightning.report.comparing import read_runs
from ftp_lightning.report.comparison_page import PLOTS, comparison_context
from ftp_lightning.report.diagnostics import diagnose
from ftp_lightning.report.reading import Run, as_stages_write, read_json, read_origins, read_run, read_settings
from ftp_lightning.report.sections import SECTIONS, Plot, Section
from ftp_lightning.report.series import Rows, closed_form, starts
from ftp_lightning.report.study import Study, read_study
from ftp_lightning.report.study_page import study_context, study_plots
from ftp_lightning.report.style import freeze, house_style, to_png, to_svg
from ftp_lightning.report.tune_page import CURVE, TUNED, curve_rows, tuned_context
from ftp_lightning.report.verdict import cards, cautions, speed_row, verdict
from ftp_lightning.report.writing import write_report

HERE = Path(__file__).parent


def build_report(run_folder: Path) -> Path:
    """Writes `run_folder/report.html` of a run, a study (a folder with study.json) or a tuning (tune.json), and every
    figure as PNG with its data as CSV in `run_folder/report/`.

    A stage that has not been run is left out with a sentence. Only files that a report makes are replaced.
    Errors: UserError if the folder is missing, holds nothing of a run or cannot be written to, or if a stage's product
    is not JSON.
    """
    folder = Path(run_folder)
    with as_stages_write(folder):
        if study := read_study(folder):
            return build_study(folder, study)
        if found := read_json(folder / TUNED):
            return build_tuned(folder, found)
        run = read_run(folder)
        drawn = {plot.name: draw(plot, plot.rows(run)) for section in SECTIONS for plot in section.plots}
        drawn = {name: files for name, files in drawn.items() if files}
        page = render(context(folder, run, {name: files["svg"] for name, files in drawn.items()}))
    return write_report(folder, page, drawn, [plot.name for section in SECTIONS for plot in section.plots])


def build_study(folder: Path, study: Study) -> Path:
    """report.html and the figures of a study, in its own folder."""
    plots = study_plots(study)
    drawn = {plot.name: draw(plot, rows) for plot, rows in plots}
    shown = [{"plot": plot, "svg": drawn[plot.name]["svg"]} for plot, _ in plots]
    earlier = [path.stem for path in (folder / "report").glob("study-*.csv")]
    return write_report(folder, render(study_context(folder, study, shown), "study.html"), drawn, earlier)


def build_tuned(folder: Path, found: dict[str, Any]) -> Path:
    """report.html and the figure of what `tune` found, in its own folder."""
    drawn = {CURVE.name: draw(CURVE, curve_rows(found))}
    shown = [{"plot": CURVE, "svg": drawn[CURVE.name]["svg"]}]
    return write_report(folder, render(tuned_context(folder, found, shown), "tune.html"), drawn, [CURVE.name])


def build_comparison(folders: list[Path], output: Path) -> Path:
    """Writes `output/report.html`, which puts the runs side by side, and its figures in `output/report/`."""
    with as_stages_write(*folders):
        runs = read_runs(folders)
        drawn = {plot.name: draw(plot, plot.rows(runs)) for plot in PLOTS}
        drawn = {name: files for name, files in drawn.items() if files}
        shown = [{"plot": plot, "svg": drawn[plot.name]["svg"]} for plot in PLOTS if plot.name in drawn]
        page = render(comparison_context(runs, shown), "compare.html")
    output.mkdir(parents=True, exist_ok=True)
    return write_report(output, page, drawn, [plot.name for plot in PLOTS])


def draw(plot: Plot, rows: Rows) -> dict[str, Any] | None:
    """{"svg": text, "png": bytes, "csv": bytes} of one figure, or None where there are no data."""
    if not rows:
        return None
    with house_style(plot.name):
        figure = plot.draw(rows)
        freeze(figure)
        return {"svg": to_svg(figure), "png": to_png(figure), "csv": to_csv(rows)}


def to_csv(rows: Rows) -> bytes:
    """The rows with a header line; floats are written so that reading them gives the same number back."""
    text = io.StringIO()
    writer = csv.DictWriter(text, fieldnames=list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({name: csv_cell(value) for name, value in row.items()} for row in rows)
    return text.getvalue().encode()


def context(folder: Path, run: Run, svgs: dict[str, str]) -> dict[str, Any]:
    """Everything the template names."""
    results, origins = run["evaluate"], read_origins(folder)
    return {
        "name": folder.resolve().name,
        "facts": facts(read_settings(folder), wording.headline_method(results)),
        "verdict": verdict(run),
        "cautions": cautions(run),
        "cards": cards(run),
        "sections": [section_context(section, run, svgs) for section in SECTIONS],
        "contents": [*CONTENTS, *((item.key, item.title) for item in SECTIONS), ("origin", "Provenance")],
        "diagnosis": diagnose(run),
        "headline_columns": headline_columns(run),
        "headline": headline_table(run),
        "headline_label": headline_label(results),
        "noise_floor": wording.noise_floor_text(results),
        "own_answers_columns": wording.OWN_ANSWERS,
        "own_answers": wording.own_answer_rows(results),
        "method_labels": [label for _, label in wording.method_labels(results)],
        "tasks": wording.task_rows(results) if results else [],
        "searches": {stage: search_summary(run[stage]) for stage in ("search", "finetune", "static") if run[stage]},
        "modes": schedule_modes(run),
        "training": run["train"],
        "story": story(run["tokens"]),
        "origins": origins,
        "commands": [o["provenance"]["command"] for o in origins if o["provenance"].get("command")],
        "number": wording.number,
    }


def section_context(section: Section, run: Run, svgs: dict[str, str]) -> dict[str, Any]:
    """One section: its figures that could be drawn, and the stages it misses."""
    plots = [{"plot": plot, "svg": svgs[plot.name]} for plot in section.plots if plot.name in svgs]
    present = any(run[product] is not None for product in section.needs)
    return {"section": section, "plots": plots, "missing": section.missing(run), "present": present}


def schedule_modes(run: Run) -> dict[str, str]:
    """What skipped tokens leave in each block, by schedule; once where two schedules agree."""
    names = {"search_schedule": "Static search", "finetune_schedule": "Fine-tuned"}
    said = {name: text for key, name in names.items() if (text := wording.modes_text(run[key]))}
    return {"Both": said["Static search"]} if len(said) == 2 and len(set(said.values())) == 1 else said


CONTENTS = (("diagnostics", "Diagnostics"),)


def headline_columns(run: Run) -> tuple[str, ...]:
    """Columns of the headline table; the last one is measured time, where the run measured it."""
    row = speed_row(run)
    return wording.HEADLINE + ((f"prefill, {row['length']:,} tokens",) if row else ())


def headline_table(run: Run) -> list[tuple[str, ...]]:
    """The headline rows, with the time of the two methods that the benchmark clocked: dense, and the headline's."""
    if not run["evaluate"]:
        return []
    rows, row, label = wording.headline_rows(run["evaluate"]), speed_row(run), headline_label(run["evaluate"])
    if not row:
        return rows
    pace = f"{row['pruned_ms']:.0f} ms ({row['speedup']:.2f}x)"
    times = {"dense": f"{row['dense_ms']:.0f} ms", label: pace}
    return [(*cells, times.get(cells[0], wording.MISSING)) for cells in rows]


def headline_label(results: dict[str, Any] | None) -> str | None:
    """The label of the row the verdict speaks about."""
    chosen = wording.headline_method(results)
    return next((label for method, label in wording.method_labels(results) if method is chosen), None)


def search_summary(metrics: dict[str, Any]) -> dict[str, Any]:
    """What a search spent and won: generations (the first population is number 0), the last counts, best KL, the KL
    it started from, and the best allocation in closed form that it had to beat.
    """
    allocations = closed_form(metrics)
    rival = min(allocations, key=allocations.__getitem__, default=None)
    last = metrics["generations"][-1] if metrics["generations"] else {}
    return {
        "generations": last.get("generation", 0),
        "last": last,
        "value": metrics["value"],
        "starts": starts(metrics),
        "rival": rival,
        "rival_kl": allocations.get(rival),
    }


def story(tokens: dict[str, Any] | None) -> dict[str, Any] | None:
    """Each token with the share of blocks that computed it and its decisions as a string of 0 and 1, one per block."""
    if not tokens:
        return None
    blocks = tokens["num_blocks"]
    decisions = ["".join(str(int(block[place])) for block in tokens["keep"]) for place in range(len(tokens["tokens"]))]
    words = [
        {**split_blank(text), "count": count, "share": round(count / blocks, 3), "keep": keep}
        for text, count, keep in zip(tokens["tokens"], tokens["computed_by"], decisions, strict=True)
    ]
    return {"title": tokens["title"], "words": words, "blocks": blocks}


def split_blank(text: str) -> dict[str, str]:
    """The blanks before a word stay uncoloured, so that words stand apart; a token of blanks alone is coloured."""
    word = text.lstrip() or text
    return {"blank": text[: len(text) - len(word)], "text": word}


def facts(settings: dict[str, Any], method: dict[str, Any] | None) -> list[str]:
    """The settings that the numbers cannot be read without; "auto" says nothing, so the measured kv mode is named."""
    settings = {**settings, "kv": method["kv"]} if method else settings
    names = [name for name in ("model", "data", "kv", "dtype", "device", "seed") if settings.get(name) is not None]
    found = [f"{name} {settings[name]}" for name in names if settings[name] != "auto"]
    if "prompt_tokens" in settings:
        found.append(f"windows of {settings['prompt_tokens']} + {settings.get('continuation_tokens')} tokens")
    return found


def render(values: dict[str, Any], template: str = "run.html") -> str:
    """The page. Every value is escaped; only the figures, which matplotlib escaped, go in as they are.

    The page's own policy forbids all loading, and allows one script: the slider, by its hash.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    slider = (HERE / "slider.js").read_text(encoding="utf-8")
    policy = b64encode(sha256(slider.encode()).digest()).decode()
    style = (HERE / "page.css").read_text(encoding="utf-8")
    return environment.get_template(template).render(**values, style=style, slider=slider, slider_hash=policy)
