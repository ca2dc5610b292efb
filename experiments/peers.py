"""Who keeps most at the same FLOPs?  python experiments/peers.py --help

Every peer of `ftp_lightning.baselines` is placed at every FLOPs cut, in each profile (the prefill of a prompt alone, or
a prompt and 128 generated tokens), and measured on the same test text and questions as experiments/budgets.py measures
them: kept answers and KL of the continuation; with planned and realised FLOPs, sparsity, bytes of keys and values, and
the time of prefill and decoding on random prompts of the profile's length. `--two_way` cuts are measured under three
schedules, so that selector and schedule are not confounded: the peer's own; the uniform one; the one searched with the
static router, the same for all. The last two leave the first block dense. Selectors with randomness or training have a
row for each seed, the others one; removed parts have no schedule.

What is searched, trained or removed is found on calibration and training text, never on test text. What is finished is
not done again. `--worker I/N` takes every N-th (profile, cut); times are to be trusted only with a core for each. With
`--tables` nothing is measured. Writes peers.csv and peers.png (the Pareto fronts) beside the rows.
"""

import argparse
import csv
import itertools
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import budgets as study
import schedules

FORMS = ("own", "uniform", "searched")
OURS = ("ftp_static", "ftp")


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--calibration", default="embedded", help="text to search, order and fit on")
    parser.add_argument("--train", default="embedded", help="text to train routers on")
    parser.add_argument("--test", action="append", metavar="NAME=SOURCE", help="test text, also of the questions")
    parser.add_argument("--peers", help="comma-separated names; default: all")
    parser.add_argument("--cuts", default="0.2,0.3,0.4,0.5,0.6,0.7", help="shares of the FLOPs")
    parser.add_argument("--profiles", default="prefill,request")
    parser.add_argument("--prompt_tokens", type=int, default=1024, help="of the profiles")
    parser.add_argument("--new_tokens", type=int, default=128, help="of the profile `request`")
    parser.add_argument("--two_way", default="0.3,0.6", help="cuts that are also measured under the other schedules")
    parser.add_argument("--kv", default="own", help="own, or one of keep, evict for all")
    parser.add_argument("--compensation", type=int, default=0, help="rank of what every peer gets; 0: none gets one")
    parser.add_argument(
        "--family", action="append", metavar="KV=FILE", help="searched schedules; else they are searched"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--items", type=int, default=2000, help="recall questions")
    parser.add_argument("--windows", type=int, default=64, help="windows of test text")
    parser.add_argument("--calibration_windows", type=int, default=16)
    parser.add_argument("--generations", type=int, default=8, help="of a search")
    parser.add_argument("--steps", type=int, default=120, help="of a training")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs of prefills, and of decoding steps; 0: none")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("runs/peers"))
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    from ftp_lightning.baselines import PEERS

    args.peers = args.peers.split(",") if args.peers else list(PEERS)
    if unknown := set(args.peers) - set(PEERS):
        parser.error(f"there is no peer {', '.join(sorted(unknown))}; peers: {', '.join(PEERS)}")
    return args


def profile_of(args, name):
    from ftp_lightning.baselines import PROFILES, Profile

    return Profile(args.prompt_tokens, args.new_tokens if PROFILES[name].new_tokens else 0)


def rows_of(args, profile, cut):
    """(peer, schedule, seed) of what is measured at one cut, in the order of the tables."""
    from ftp_lightning.baselines import PEERS

    first = cut == min(map(float, args.cuts.split(",")))
    two_way = args.two_way and cut in map(float, args.two_way.split(","))
    for name in args.peers:
        peer = PEERS[name]
        if name == "last_block_free" and not first:
            continue  # it has one point
        alone = peer.own_schedule_only or name in OURS or not two_way
        seeds = map(int, args.seeds.split(",")) if peer.seeded or peer.trained else [0]
        yield from itertools.product([name], FORMS[:1] if alone else FORMS, seeds)


class Bench:
    """The model, what peers are placed with, and the test; made once per process."""

    def __init__(self, args):
        from ftp_lightning.baselines import Setting

        self.args = args
        source = next(iter(study.tests_of(args).values()))
        self.test = study.Test(args, 0, source, recall=True)
        self.model, tokenizer = self.test.model, self.test.tokenizer

        calibration = study.search_windows(tokenizer, args.calibration, "calibration", args.calibration_windows, 0)
        self.training = lambda seed: study.search_windows(tokenizer, args.train, "training", 4 * args.steps, seed)
        self.validation = calibration
        influence = self._influence()
        self.setting = Setting(self.model, 0, calibration, tuple(influence), rank=args.compensation)
        self.order_file = args.output / "block_pruner.json"
        if self.order_file.exists():
            known = json.loads(self.order_file.read_text())
            self.setting.memo["block_pruner"] = [(block, part) for block, part in known]
        self.families = dict(pair.split("=", 1) for pair in args.family or [])

    def _shared(self):
        shared = {"model": self.args.model, "dtype": self.args.dtype, "device": "cpu", "tracking": "none"}
        return shared | study.whole(self.args.calibration)

    def _influence(self):
        from ftp_lightning.stages.sensitivity import SensitivityStage

        folder = self.args.output / "sensitivity"
        SensitivityStage(**self._shared(), windows=self.args.calibration_windows, output=str(folder)).execute()
        return json.loads((folder / "sensitivity.json").read_text())["block_influence"]

    def searched(self, kv, cut, profile):
        """The form searched with the static router at the token budget of this cut, or that of the given family."""
        from ftp_lightning import Schedule
        from ftp_lightning.pruning.budget import solve_budget
        from ftp_lightning.schedule_family import ScheduleFamily
        from ftp_lightning.stages.search import SearchStage

        about = {"new_tokens": profile.new_tokens, "rank": self.args.compensation}
        budget = solve_budget(self.model, cut, profile.prompt_tokens, kv, **about).budget
        if kv in self.families:
            family = ScheduleFamily.load(self.families[kv])
            return family.at(min(budget, family.budgets[-1]))
        folder = self.args.output / f"search-{kv}-{budget:.4f}"
        measured = str(self.args.output / "sensitivity" / "sensitivity.json")
        about = {"offspring": 10, "windows": self.args.calibration_windows, "generations": self.args.generations}
        SearchStage(
            **self._shared(), **about, budget=round(budget, 4), kv=kv, sensitivity=measured, output=str(folder)
        ).execute()
        return Schedule.load(folder / "schedule.json")

    def placed(self, name, form, seed, cut, profile):
        """The pruner of one row, trained where it has to be."""
        from ftp_lightning.baselines import PEERS, first_dense
        from ftp_lightning.schedule import Schedule

        peer, self.setting.seed = PEERS[name], seed
        kv = None if self.args.kv == "own" else self.args.kv
        if form == "searched" or name in OURS:
            self.setting.searched = self.searched(kv or peer.kv, cut, profile)
        forms = {"own": lambda: None, "uniform": lambda: Schedule.uniform(self.setting.blocks, 1.0)}
        whole = forms.get(form, lambda: self.setting.searched)()
        whole = None if whole is None else first_dense(whole)
        kv = None if peer.own_schedule_only else kv
        pruner = peer.place(self.setting, cut, profile, whole, kv)
        study.write(self.order_file, self.setting.memo.get("block_pruner", []))
        return pruner, peer.trained

    def train(self, pruner, seed, place):
        from ftp_lightning.lit.fitting import fit_router
        from ftp_lightning.lit.training_settings import TrainingSettings

        settings = TrainingSettings(steps=self.args.steps, validations=3, seed=seed)
        fit_router(self.model, pruner, self.training(seed), self.validation, settings, place, fingerprint=place.name)

    def measure(self, pruner, cut, profile):
        """Everything about one row."""
        from ftp_lightning.pruning.request import planned_cut, realised_cut

        found = self.test.measure(pruner)
        prompts = self.test.windows.input_ids[:16, : self.test.windows.prompt_tokens]
        trace = self.prefilled(pruner, prompts)
        removed = len(pruner.removed) / 2 / len(pruner.kv)
        return found | {
            "planned_cut": planned_cut(self.model, pruner, profile.prompt_tokens, profile.new_tokens),
            "flops_cut": realised_cut(self.model, pruner, trace),
            "nominal": pruner.schedule.budget * len(pruner.addressed) / (2 if pruner.parts != "block" else 1) + removed,
            "kv": pruner.kv[0] if len(set(pruner.kv)) == 1 else "mixed",
            "sparsity": list(pruner.schedule.sparsity),
            "removed": [list(part) for part in pruner.removed],
            **self.costs(pruner, profile),
        }

    def prefilled(self, pruner, ids):
        import torch

        with torch.no_grad(), pruner(self.model):
            self.model(input_ids=ids.to(self.model.device), use_cache=True, logits_to_keep=1)
        return pruner.trace.prompt

    def costs(self, pruner, profile):
        """On a random prompt of the profile's length: realised cut of the request, bytes, time."""
        import torch

        from ftp_lightning.evaluation.prompts import random_prompts
        from ftp_lightning.evaluation.speed import decode_speed, prefill_speed
        from ftp_lightning.pruning.flops import cached_bytes
        from ftp_lightning.pruning.request import kept_bytes, realised_cut
        from ftp_lightning.schedule import Schedule

        generator = torch.Generator().manual_seed(0)
        prompts = random_prompts(self.model, profile.prompt_tokens, 1, generator=generator)
        trace = self.prefilled(pruner, prompts.ids)
        dense = Schedule.uniform(len(pruner.kv), 0.0)
        every = cached_bytes(self.model, dense, profile.prompt_tokens, "evict")
        found = {
            "realised_cut": realised_cut(self.model, pruner, trace, profile.new_tokens),
            "kv_share": kept_bytes(self.model, pruner, trace) / every,
        }
        if self.args.pairs:
            about = {"generator": generator}
            for name, measured in (
                ("prefill", prefill_speed(self.model, pruner, prompts, self.args.pairs, **about)),
                ("decode", decode_speed(self.model, pruner, prompts, self.args.pairs, **about)),
            ):
                found |= {f"{name}_ms": measured.pruned_ms, f"{name}_dense_ms": measured.dense_ms}
                found |= {f"{name}_speedup": measured.ratio.value}
        return found


def row_file(args, profile, cut, name, form, seed):
    return args.output / "rows" / f"{profile}-{cut}-{name}-{form}-{args.kv}-{seed}.json"


def wanted(args, path):
    """Whether a row is missing, or was measured at other sizes."""
    sizes = [args.items, args.windows, args.dtype, args.prompt_tokens, args.new_tokens, args.compensation, args.steps]
    return sizes, not path.exists() or json.loads(path.read_text())["sizes"] != sizes


def run(args):
    from ftp_lightning.pruning.budget import OutOfReach

    (args.output / "rows").mkdir(parents=True, exist_ok=True)
    cells = itertools.product(args.profiles.split(","), map(float, args.cuts.split(",")))
    bench = None
    for profile, cut in study.own_cells(args, cells):
        for name, form, seed in rows_of(args, profile, cut):
            path = row_file(args, profile, cut, name, form, seed)
            sizes, missing = wanted(args, path)
            if not missing:
                continue
            bench, start = bench or Bench(args), time.process_time()
            row = {"sizes": sizes, "peer": name, "schedule": form, "profile": profile, "cut": cut, "seed": seed}
            request = profile_of(args, profile)
            try:
                pruner, trained = bench.placed(name, form, seed, cut, request)
                if trained:
                    bench.train(pruner, seed, args.output / "trained" / path.stem)
                row |= bench.measure(pruner, cut, request)
            except OutOfReach as error:
                row["unreachable"] = str(error).splitlines()[0]
            study.write(path, schedules.compact(row))
            study.write(args.output / "dense.json", bench.test.dense)
            said = row.get("unreachable") or f"kept {row['kept']['share']:.3f}, KL {row['kl']:.4f}"
            print(
                f"{profile} {cut:.0%} {name} {form} seed {seed}: {said} ({time.process_time() - start:.0f} s)",
                flush=True,
            )


# ---------------------------------------------------------------- what was found


def finished(args):
    """All rows, in the order of the tables."""
    from ftp_lightning.baselines import PEERS

    rows = [json.loads(path.read_text()) for path in sorted((args.output / "rows").glob(f"*-{args.kv}-*.json"))]
    place = list(PEERS)
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
    values = [row[name]["share"] if name == "kept" else row.get(name) for row in rows]
    return None if None in values else statistics.mean(values)


def main_table(args, rows, profile, cut):
    """Markdown: every peer under its own schedule; ours against it, paired over questions."""
    from ftp_lightning.baselines import PEERS

    here = [row for row in rows if row["profile"] == profile and row["cut"] == cut and row["schedule"] == "own"]
    if not here:
        return
    print(f"\n### {profile}, {cut:.0%} of the FLOPs\n")
    print(
        "| method | seeds | kept, % | KL | FTP static - it: kept, points | FLOPs cut: planned, realised "
        "| on the test prompts | skipped: nominal, realised | KV bytes, % | prefill | decode |"
    )
    print("|---" * 11 + "|")
    ours = next((row for row in here if row["peer"] == OURS[0] and "kept" in row), None)
    for (name,), found in grouped(here, "peer").items():
        print(f"| {PEERS[name].title} | {len(found)} | {' | '.join(table_row(found, ours))} |")
    for row in here:
        if "unreachable" in row and row["seed"] == 0:
            print(f"\n{PEERS[row['peer']].title}: {row['unreachable']}")


def table_row(found, ours):
    kept = study.mean_std([100 * row["kept"]["share"] for row in found], 1)
    low, high = (100 * statistics.mean(row["kept"][side] for row in found) for side in ("low", "high"))
    paired = [
        100.0 * (a - b)
        for row in found
        for a, b, need in zip((ours or row)["right"], row["right"], row["need"])
        if need
    ]
    against = "" if ours is None or found[0] is ours or not paired else schedules.interval(paired, 1)
    cells = [f"{kept} [{low:.1f}, {high:.1f}]", study.mean_std([row["kl"] for row in found], 4), against]
    cells.append(", ".join(f"{mean(found, name):.1%}" for name in ("planned_cut", "realised_cut")))
    cells.append(f"{mean(found, 'flops_cut'):.1%}")
    cells.append(", ".join(f"{mean(found, name):.1%}" for name in ("nominal", "realised")))
    cells.append(f"{100 * mean(found, 'kv_share'):.0f}")
    for name in ("prefill", "decode"):
        times = mean(found, f"{name}_ms"), mean(found, f"{name}_speedup")
        cells.append("" if None in times else f"{times[0]:.1f} ms, {times[1]:.2f}x")
    return cells


def two_way_table(args, rows, profile, cut):
    """Markdown: selector x schedule, kept in % and KL."""
    from ftp_lightning.baselines import PEERS

    found = grouped([r for r in rows if r["profile"] == profile and r["cut"] == cut], "peer", "schedule")
    names = [name for name in PEERS if (name, "uniform") in found or (name, "searched") in found]
    if not names:
        return
    print(f"\n### {profile}, {cut:.0%} of the FLOPs: kept, % (KL), by selector and schedule\n")
    print("| selector | kv | its own | uniform | searched |\n|---|---|---|---|---|")
    for name in names:
        cells = [found.get((name, form)) for form in FORMS]
        shown = ["" if c is None else f"{100 * mean(c, 'kept'):.1f} ({mean(c, 'kl'):.4f})" for c in cells]
        kv = next(c for c in cells if c)[0]["kv"]
        print(f"| {PEERS[name].title} | {kv} | {' | '.join(shown)} |")


def front(points, near=0.01):
    """Names whose (x, kept) no other point beats in both, x within `near` counting as equal.

    points: name -> [(x, kept)]."""
    every = [(name, x, y) for name, line in points.items() for x, y in line]
    beaten = lambda x, y: any((a >= x - near and b > y) or (a > x + near and b >= y) for _, a, b in every)  # noqa: E731
    return [name for name in points if any(not beaten(x, y) for x, y in points[name])]


def lines(rows, profile, x, y):
    """name -> [(x, y)] by rising cut, means over seeds, under the peer's own schedule."""
    own = [row for row in rows if row["profile"] == profile and row["schedule"] == "own"]
    found = {}
    for (name, _), some in grouped(own, "peer", "cut").items():
        point = mean(some, x), mean(some, y)
        if None not in point:
            found.setdefault(name, []).append(point)
    return {name: sorted(line) for name, line in found.items()}


def csv_file(args, rows):
    names = ["profile", "cut", "peer", "schedule", "kv", "seed", "kept", "kept_low", "kept_high", "items", "kl", "ppl"]
    names += ["planned_cut", "realised_cut", "flops_cut", "nominal", "realised", "kv_share"]
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

    profiles = [name for name in args.profiles.split(",") if lines(rows, name, "planned_cut", "kept")]
    if not profiles:
        return
    axes_of = [("planned_cut", "FLOPs cut", "kept"), ("planned_cut", "FLOPs cut", "kl")]
    if any("prefill_speedup" in row for row in rows):
        axes_of += [("prefill_speedup", "prefill, times faster", y) for y in ("kept", "kl")]
    with house_style("peers"):
        drawing, axes = canvas(
            4.2 * len(axes_of), 3.6 * len(profiles) + 1, nrows=len(profiles), ncols=len(axes_of), squeeze=False
        )
        for profile, panels in zip(profiles, axes):
            for axis, (x, label, y) in zip(panels, axes_of):
                found = lines(rows, profile, x, y)
                draw(axis, found)
                axis.set(xlabel=label, ylabel="kept answers" if y == "kept" else "KL (nats)", title=profile)
                if x == "planned_cut" and found:  # a negative cut is off the scale
                    axis.set_xlim(0, 0.05 + max(point[0] for line in found.values() for point in line))
                if y == "kl":
                    losses = [point[1] for line in found.values() for point in line if point[1] > 1e-5]
                    kl_scale_to_range(axis, losses or [1.0])
        handles = {label: handle for axis in axes.flat for handle, label in zip(*axis.get_legend_handles_labels())}
        drawing.legend(handles.values(), handles.keys(), loc="outside upper center", ncols=4)
        freeze(drawing)
        (args.output / "peers.png").write_bytes(to_png(drawing))


def draw(axis, found):
    """A line per peer: colours take turns, then dashes; ours is thick."""
    from ftp_lightning.baselines import PEERS
    from ftp_lightning.report.style import CYCLE, LINES

    for place, name in enumerate(PEERS):
        if name in found:
            style = {"color": CYCLE[place % len(CYCLE)], "linestyle": LINES[place // len(CYCLE) % len(LINES)]}
            width = 2.8 if name in OURS else 1.1
            axis.plot(*zip(*found[name]), **style, linewidth=width, marker="o", markersize=3, label=PEERS[name].title)


def report(args):
    rows = finished(args)
    for profile, cut in itertools.product(args.profiles.split(","), map(float, args.cuts.split(","))):
        main_table(args, rows, profile, cut)
        two_way_table(args, rows, profile, cut)
    for profile in args.profiles.split(","):
        for x in ("planned_cut", "prefill_speedup"):
            if found := lines(rows, profile, x, "kept"):
                print(f"\n{profile}: on the front of kept answers against {x}: {', '.join(front(found))}")
    if rows:
        csv_file(args, rows)
        figure(args, rows)


def main():
    args = arguments()
    if not args.tables:
        run(args)
    report(args)


if __name__ == "__main__":
    main()
