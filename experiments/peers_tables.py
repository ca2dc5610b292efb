"""What experiments/peers.py has measured, said: tables, the fronts, a CSV and a figure."""

import csv
import itertools
import json
import statistics

import budgets as study

FORMS = ("own", "uniform", "searched")
OURS = ("ftp_static", "ftp", "ftp_projected")
AXES = {"realised_cut": "FLOPs cut", "prefill_speedup": "prefill, times faster"}
"""What a method costs: more is cheaper."""
NEAR = {"realised_cut": 0.02, "prefill_speedup": 0.05}
"""Costs that count as equal: what placing (removal goes by parts, a 24th of this model each) and timing leave open."""


def methods(projected=None, least=0.0):
    """Peers by name, in the order of the tables; the last one is nothing without the folder of its routers."""
    from ftp_lightning.baselines.registry import PEERS, FtpProjected

    return PEERS | {"ftp_projected": FtpProjected(projected, least)}


def finished(args):
    """All rows, in the order of the tables."""
    files = sorted(args.output.glob(f"*-0.*-{args.kv}.json"))
    rows = [row for path in files for row in json.loads(path.read_text()).values()]
    place = list(methods())
    return sorted(
        rows, key=lambda r: (r["profile"], r["cut"], place.index(r["peer"]), FORMS.index(r["schedule"]), r["seed"])
    )


def grouped(rows, *names):
    """{values of `names`: rows}, reached ones alone."""
    found = {}
    for row in rows:
        if "kept" in row:
            found.setdefault(tuple(row[name] for name in names), []).append(row)
    return found


def mean(rows, name):
    """Over the rows that have it (times are those of one seed); None where none has."""
    values = [row[name]["share"] if name == "kept" else row.get(name) for row in rows]
    values = [value for value in values if value is not None]
    return statistics.mean(values) if values else None


def own_rows(rows, profile, cut=None):
    """Those under the peers' own schedules."""
    own = [row for row in rows if row["profile"] == profile and row["schedule"] == "own"]
    return own if cut is None else [row for row in own if row["cut"] == cut]


# ---------------------------------------------------------------- comparisons, paired


def items_of(row, what):
    """Each item's value under one seed: "kept" 0 or 1 over the questions that need the passage, "kl" over windows."""
    if what == "kl":
        return row["kl_rows"]
    return [float(right) for right, need in zip(row["right"], row["need"]) if need]


def difference(ours, others, what):
    """Text: ours - others, with its interval over items and seeds; the items are the same under every seed."""
    seeds = range(max(len(ours), len(others)))
    pairs = [(ours[seed % len(ours)], others[seed % len(others)]) for seed in seeds]
    rows = [
        (a, b, item, seed)
        for seed, (one, two) in enumerate(pairs)
        for item, (a, b) in enumerate(zip(items_of(one, what), items_of(two, what), strict=True))
    ]
    return study.interval(rows, 1, 100.0) if what == "kept" else study.interval(rows, 4)


def share(rows):
    """`Interval` of the answers kept, over questions and seeds."""
    from ftp_lightning.evaluation.statistics import clustered

    items = [(right, item, seed) for seed, row in enumerate(rows) for item, right in enumerate(items_of(row, "kept"))]
    return clustered(*map(list, zip(*items)))


def main_table(args, rows, profile, cut):
    """Markdown: every peer under its own schedule; the best of ours against it, paired."""
    here, titles = own_rows(rows, profile, cut), methods()
    if not here:
        return
    found = grouped(here, "peer")
    ours = next((name for name in ("ftp_projected", "ftp_static") if (name,) in found), None)
    against = "" if ours is None else f" {titles[ours].title} - it: kept, points | and KL |"
    print(f"\n### {profile}, {cut:.0%} of the FLOPs\n")
    print(
        f"| method | seeds | kept, % | KL |{against} FLOPs cut: planned, realised "
        "| on the test prompts | skipped: nominal, realised | KV bytes, % | prefill | decode |"
    )
    print("|---" * (9 + 2 * bool(ours)) + "|")
    for (name,), some in found.items():
        paired = [] if ours is None else ["", ""]
        if ours not in (None, name):
            paired = [difference(found[(ours,)], some, what) for what in ("kept", "kl")]
        print(f"| {titles[name].title} | {len(some)} | {' | '.join(table_row(some, paired))} |")
    for row in here:
        if "unreachable" in row and row["seed"] == 0:
            print(f"\n{titles[row['peer']].title}: {row['unreachable']}")


def table_row(found, paired):
    kept = share(found).scaled(100)
    shown = f"{kept_of(found)} [{kept.low:.1f}, {kept.high:.1f}]"
    cells = [shown, study.mean_std([row["kl"] for row in found], 4), *paired]
    cells.append(", ".join(f"{mean(found, name):.1%}" for name in ("planned_cut", "realised_cut")))
    cells.append(f"{mean(found, 'flops_cut'):.1%}")
    cells.append(", ".join(f"{mean(found, name):.1%}" for name in ("nominal", "realised")))
    cells.append(f"{100 * mean(found, 'kv_share'):.0f}")
    for name in ("prefill", "decode"):
        times = mean(found, f"{name}_ms"), mean(found, f"{name}_speedup")
        cells.append("" if None in times else f"{times[0]:.1f} ms, {times[1]:.2f}x")
    return cells


def overview(args, rows, profile):
    """Markdown: kept in % and KL of every peer under its own schedule, by cut."""
    here, titles = own_rows(rows, profile), methods()
    cuts = sorted({row["cut"] for row in here})
    found = grouped(here, "peer", "cut")
    print(f"\n### {profile}: kept, % (KL), by method and FLOPs cut\n")
    print(f"| method | seeds |{''.join(f' {cut:.0%} |' for cut in cuts)}\n|{'---|' * (2 + len(cuts))}")
    for name in titles:
        some = [found.get((name, cut)) for cut in cuts]
        if any(some):
            seeds = "-".join(str(n) for n in sorted({len(c) for c in some if c}))
            cells = [f"{kept_of(c)} ({mean(c, 'kl'):.3f})" if c else "" for c in some]
            print(f"| {titles[name].title} | {seeds} | {' | '.join(cells)} |")


def kept_of(rows):
    return study.mean_std([100 * row["kept"]["share"] for row in rows], 1)


def two_way_table(args, rows, profile, cut):
    """Markdown: selector x schedule, kept in % and KL."""
    titles = methods()
    found = grouped([r for r in rows if r["profile"] == profile and r["cut"] == cut], "peer", "schedule")
    names = [name for name in titles if (name, "uniform") in found or (name, "searched") in found]
    if not names:
        return
    print(f"\n### {profile}, {cut:.0%} of the FLOPs: kept, % (KL), by selector and schedule\n")
    print("| selector | kv | its own | uniform | searched |\n|---|---|---|---|---|")
    for name in names:
        cells = [found.get((name, form)) for form in FORMS]
        shown = ["" if c is None else f"{100 * mean(c, 'kept'):.1f} ({mean(c, 'kl'):.4f})" for c in cells]
        kv = next(c for c in cells if c)[0]["kv"]
        print(f"| {titles[name].title} | {kv} | {' | '.join(shown)} |")


# ---------------------------------------------------------------- fronts


def front(points, near=0.01):
    """{name: its undominated (x, y)}: no point of *another* name is better in one and as good in the other; more is
    better in both, and x within `near` counts as equal.

    points: name -> [(x, y)]."""
    every = [(name, x, y) for name, line in points.items() for x, y in line]

    def beaten(name, x, y):
        return any(n != name and ((a >= x - near and b > y) or (a > x + near and b >= y)) for n, a, b in every)

    found = {name: [(x, y) for x, y in line if not beaten(name, x, y)] for name, line in points.items()}
    return {name: line for name, line in found.items() if line}


def line_of(rows, profile, x, y):
    """name -> {cut: (x, y)}, means over seeds, under the peers' own schedules; of KL the negative: more is better."""
    found = {}
    for (name, cut), some in grouped(own_rows(rows, profile), "peer", "cut").items():
        point = mean(some, x), mean(some, y)
        if None not in point:
            found.setdefault(name, {})[cut] = point[0], -point[1] if y == "kl" else point[1]
    return found


def front_table(args, rows, profile, x):
    """Markdown: at which cuts a method is on the front of kept answers (K) and of KL (L) against x."""
    cuts = sorted({row["cut"] for row in own_rows(rows, profile)})
    marks = {}
    for y, mark in (("kept", "K"), ("kl", "L")):
        points = line_of(rows, profile, x, y)
        best = front({name: list(line.values()) for name, line in points.items()}, NEAR[x])
        for name, cut in itertools.product(best, cuts):
            if points[name].get(cut) in best[name]:
                marks[name, cut] = marks.get((name, cut), "") + mark
    if not marks:
        return
    print(f"\n### {profile}: not dominated in kept answers (K), in KL (L), against {AXES[x]}\n")
    print(f"| method |{''.join(f' {cut:.0%} |' for cut in cuts)}\n|---|{'---|' * len(cuts)}")
    for name, peer in methods().items():
        if any(mark[0] == name for mark in marks):
            print(f"| {peer.title} | {' | '.join(marks.get((name, cut), '') for cut in cuts)} |")


def judgement(args, rows, profile, what):
    """Markdown: at each cut the best of the others, and each of ours against it, paired."""
    cuts, titles = sorted({row["cut"] for row in own_rows(rows, profile)}), methods()
    ours = [name for name in OURS if any(row["peer"] == name for row in own_rows(rows, profile))]
    if not ours:
        return
    unit = "kept, points" if what == "kept" else "KL, nats"
    print(f"\n### {profile}: ours against the best of the others at each cut ({unit})\n")
    print(f"| FLOPs cut | best of the others | it has |{''.join(f' {titles[n].title} - it |' for n in ours)}")
    print("|---" * (3 + len(ours)) + "|")
    for cut in cuts:
        found = {name: some for (name,), some in grouped(own_rows(rows, profile, cut), "peer").items()}
        # what does not reach the cut is no rival at it
        rivals = [n for n in found if n not in OURS and mean(found[n], "realised_cut") > cut - 0.03]
        if not rivals:
            continue
        best = max(rivals, key=lambda n: mean(found[n], "kept") if what == "kept" else -mean(found[n], "kl"))
        value = mean(found[best], what)
        cells = [titles[best].title, f"{100 * value:.1f} %" if what == "kept" else f"{value:.4f}"]
        cells += [difference(found[n], found[best], what) if n in found else "" for n in ours]
        print(f"| {cut:.0%} | {' | '.join(cells)} |")


# ---------------------------------------------------------------- files


def csv_file(args, rows):
    names = ["profile", "cut", "peer", "schedule", "kv", "seed", "kept", "kept_low", "kept_high", "items", "kl", "ppl"]
    names += ["planned_cut", "realised_cut", "flops_cut", "nominal", "realised", "kv_share", "trained_at"]
    names += ["prefill_ms", "prefill_dense_ms", "prefill_speedup", "decode_ms", "decode_dense_ms", "decode_speedup"]
    with (args.output / "peers.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, [*names, "unreachable"], extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            kept = row.get("kept", {})
            told = {"kept": kept.get("share"), "kept_low": kept.get("low"), "kept_high": kept.get("high")}
            writer.writerow(row | told | {"items": kept.get("items")})


def figure(args, rows):
    """peers.png: kept answers and KL against the FLOPs cut and against the measured prefill speed-up, by profile."""
    from ftp_lightning.report.figures import kl_scale_to_range
    from ftp_lightning.report.style import canvas, freeze, house_style, to_png

    profiles = [name for name in args.profiles.split(",") if own_rows(rows, name)]
    if not profiles:
        return
    costs = [x for x in AXES if any(x in row for row in rows)]
    panels = list(itertools.product(profiles, costs))
    with house_style("peers"):
        drawing, axes = canvas(10.5, 3.6 * len(panels) + 1.3, nrows=len(panels), ncols=2, squeeze=False)
        for row, (profile, x) in zip(axes, panels):
            for axis, y in zip(row, ("kept", "kl")):
                lines = line_of(rows, profile, x, y)
                lines = {name: [line[cut] for cut in sorted(line)] for name, line in lines.items()}
                if y == "kl":
                    lines = {name: [(a, -b) for a, b in line] for name, line in lines.items()}
                draw(axis, lines)
                axis.set(xlabel=AXES[x], ylabel="kept answers" if y == "kept" else "KL (nats)", title=profile)
                if x == "realised_cut" and lines:  # a negative cut is off the scale
                    axis.set_xlim(0, 0.05 + max(point[0] for line in lines.values() for point in line))
                if y == "kl":
                    losses = [point[1] for line in lines.values() for point in line if point[1] > 1e-5]
                    kl_scale_to_range(axis, losses or [1.0])
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
        drawing.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=3)
        freeze(drawing)
        (args.output / "peers.png").write_bytes(to_png(drawing))


MARKS = "os^vDPX"


def draw(axis, found):
    """A line per peer: thin and dashed, colours and marks take turns; ours are thick and solid."""
    from ftp_lightning.report.style import BLUE, CYCLE, ORANGE, VERMILLION

    thick = dict(zip(OURS, (ORANGE, VERMILLION, BLUE)))
    thin = [name for name in methods() if name not in OURS]
    for name, peer in methods().items():
        if name not in found:
            continue
        if name in thick:
            style = {"color": thick[name], "linewidth": 2.6, "marker": "o", "markersize": 5, "zorder": 3}
        else:
            place = thin.index(name)
            style = {"color": CYCLE[place % len(CYCLE)], "linestyle": ("--", ":", "-.")[place // len(CYCLE) % 3]}
            style |= {"linewidth": 1.0, "marker": MARKS[place % len(MARKS)], "markersize": 3.5}
        axis.plot(*zip(*found[name]), **style, label=peer.title)


def report(args):
    rows = finished(args)
    profiles = [name for name in args.profiles.split(",") if own_rows(rows, name)]
    for profile in profiles:
        overview(args, rows, profile)
        for cut in sorted({row["cut"] for row in rows if row["profile"] == profile}):
            main_table(args, rows, profile, cut)
            two_way_table(args, rows, profile, cut)
        for what in ("kept", "kl"):
            judgement(args, rows, profile, what)
        for x in AXES:
            front_table(args, rows, profile, x)
    if rows:
        csv_file(args, rows)
        figure(args, rows)
