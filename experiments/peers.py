"""Who keeps most at the same FLOPs?  python experiments/peers.py --help

Every peer of `ftp_lightning.baselines` is placed at every FLOPs cut, in each profile (the prefill of a prompt alone, or
a prompt and 128 generated tokens), and measured on the same test text and questions as experiments/budgets.py measures
them: kept answers and KL of the continuation; with planned and realised FLOPs, sparsity, bytes of keys and values, and
the time of the prefill (in the profile `request`: of decoding too) on random prompts of the profile's length.
`--two_way` cuts are measured under three schedules, so that selector and schedule are not confounded: the peer's own;
the uniform one; the one searched with the static router, the same for all. The last two leave the first block dense.
Selectors with randomness have a row for each of `--seeds`, those that are trained here for each of `--trained_seeds`,
the others one; removed parts have no schedule. `--projected FOLDER` adds the routers that experiments/routers.py left
there, a row for each seed.

What is searched, trained or removed is found on calibration and training text, the best state of a training chosen on
validation text; test text is only measured on. With `--trained_at` a router is trained at these cuts alone, and serves
the others from the nearest. What is finished is not done again. `--worker I/N` takes every N-th (profile, cut). Times
are those of the first seed, by the wall, or with `--clock process` the processor time of this process: what one thread
would take if it had its core alone. With `--tables` nothing is measured. A file of rows for each (profile, cut);
peers.csv and peers.png (the Pareto fronts) beside them.
"""

import argparse
import functools
import itertools
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
import budgets as study
import peers_tables as tables
import schedules

FORMS = tables.FORMS
CLOCKS = {"wall": time.perf_counter, "process": time.process_time}


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--calibration", default="embedded", help="text to search, order and fit on")
    parser.add_argument("--train", default="embedded", help="text to train routers on")
    parser.add_argument("--validation", default="embedded", help="text that the best state of a training is chosen on")
    parser.add_argument("--test", action="append", metavar="NAME=SOURCE", help="test text, also of the questions")
    parser.add_argument("--peers", help="comma-separated names; default: all")
    parser.add_argument("--projected", type=Path, metavar="FOLDER", help="trained routers: adds ftp_projected")
    parser.add_argument("--least", type=float, default=0.0, help="of ftp_projected: blocks below this stay dense")
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
    parser.add_argument("--trained_seeds", help="default: those of --seeds")
    parser.add_argument("--trained_at", help="cuts at which routers are trained; default: each of --cuts")
    parser.add_argument("--items", type=int, default=2000, help="recall questions")
    parser.add_argument("--windows", type=int, default=64, help="windows of test text")
    parser.add_argument("--calibration_windows", type=int, default=16)
    parser.add_argument("--generations", type=int, default=8, help="of a search")
    parser.add_argument("--steps", type=int, default=120, help="of a training")
    parser.add_argument("--pairs", type=int, default=15, help="timed pairs of prefills, and of decoding steps; 0: none")
    parser.add_argument("--clock", default="wall", choices=CLOCKS)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--output", type=Path, default=Path("runs/peers"))
    parser.add_argument("--worker", default="0/1")
    parser.add_argument("--tables", action="store_true")
    args = parser.parse_args()
    known = tables.methods(args.projected)
    default = ",".join(name for name in known if name != "ftp_projected" or args.projected)
    args.peers = study.chosen(parser, args.peers or default, known, "peer", ",")
    if "ftp_projected" in args.peers and not args.projected:
        parser.error("ftp_projected needs --projected FOLDER, what experiments/routers.py has trained")
    return args


def profile_of(args, name):
    from ftp_lightning.baselines.registry import PROFILES, Profile

    return Profile(args.prompt_tokens, args.new_tokens if PROFILES[name].new_tokens else 0)


def numbers(words):
    return [float(word) for word in words.split(",")]


def rows_of(args, cut):
    """(peer, schedule, seed) of what is measured at one cut, in the order of the tables."""
    known, first = tables.methods(args.projected), cut == min(numbers(args.cuts))
    two_way = args.two_way and cut in numbers(args.two_way)
    for name in args.peers:
        peer = known[name]
        if name == "last_block_free" and not first:
            continue  # it has one point
        alone = peer.own_schedule_only or name in tables.OURS or not two_way
        several = args.trained_seeds or args.seeds if peer.trained else args.seeds
        seeds = map(int, several.split(",")) if peer.seeded or peer.trained else [0]
        yield from itertools.product([name], FORMS[:1] if alone else FORMS, seeds)


class Bench:
    """The model, what peers are placed with, and the test; made once per process."""

    def __init__(self, args):
        from ftp_lightning.baselines.registry import Setting

        self.args, self.peers, self.trained = args, tables.methods(args.projected, args.least), {}
        source = next(iter(study.tests_of(args).values()))
        self.test = study.Test(args, 0, source, recall=True)
        self.model, self.tokenizer = self.test.model, self.test.tokenizer
        self._needed_alone()
        self.calibration = study.search_windows(
            self.tokenizer, args.calibration, "calibration", args.calibration_windows, 0
        )
        influence = self._influence()
        self.setting = Setting(self.model, 0, self.calibration, tuple(influence), rank=args.compensation)
        self.order_file = args.output / "block_pruner.json"
        if self.order_file.exists():
            known = json.loads(self.order_file.read_text())
            self.setting.memo["block_pruner"] = [(block, part) for block, part in known]
        self.families = dict(pair.split("=", 1) for pair in args.family or [])

    def _needed_alone(self):
        """Asks only the questions that count: dense answers them with the passage, and not without its facts."""
        test = self.test
        needed = [place for place, (a, b) in enumerate(zip(test.right, test.without)) if a and not b]
        for name in ("questions", "right", "without"):
            setattr(test, name, [getattr(test, name)[place] for place in needed])

    def _shared(self):
        shared = {"model": self.args.model, "dtype": self.args.dtype, "device": "cpu", "tracking": "none"}
        return shared | study.whole(self.args.calibration)

    def _influence(self):
        from ftp_lightning.stages.sensitivity import SensitivityStage

        folder = self.args.output / "sensitivity"
        measured = folder / "sensitivity.json"
        if not measured.exists():
            SensitivityStage(**self._shared(), windows=self.args.calibration_windows, output=str(folder)).execute()
        return json.loads(measured.read_text())["block_influence"]

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
        """The pruner of one row, its router not yet trained."""
        from ftp_lightning.baselines.registry import first_dense
        from ftp_lightning.schedule import Schedule

        peer, self.setting.seed = self.peers[name], seed
        kv = None if self.args.kv == "own" else self.args.kv
        if form == "searched" or name in ("ftp_static", "ftp"):
            self.setting.searched = self.searched(kv or peer.kv, cut, profile)
        forms = {"own": lambda: None, "uniform": lambda: Schedule.uniform(self.setting.blocks, 1.0)}
        whole = forms.get(form, lambda: self.setting.searched)()
        whole = None if whole is None else first_dense(whole)
        kv = None if peer.own_schedule_only and name != "ftp_projected" else kv
        pruner = peer.place(self.setting, cut, profile, whole, kv)
        study.write(self.order_file, self.setting.memo.get("block_pruner", []))
        return pruner

    def ready(self, name, form, seed, cut, profile):
        """(pruner of one row, the cut that its router was trained at: None where nothing is trained here)."""
        if not self.peers[name].trained:
            return self.at_cut(lambda wanted: self.placed(name, form, seed, wanted, profile), cut, profile), None
        at, router = self.router(name, form, seed, cut, profile)
        placed = lambda wanted: self.placed(name, form, seed, wanted, profile).changed(router=router)  # noqa: E731
        return self.at_cut(placed, cut, profile), at

    def at_cut(self, placed, cut, profile, near=0.005, most=4):
        """The pruner whose *realised* cut is `cut`, by asking `placed` for others.

        Plans count the queries that are left as spread evenly over the prompt; a router that keeps the latest has
        those that see most keys, and under `keep` saves less than planned. What removes parts, or is charged more for
        a look than it saves, stays where it was placed, and so does what cannot be planned to cut more."""
        from ftp_lightning.pruning.budget import OutOfReach

        pruner, wanted = placed(cut), cut
        for _ in range(most):
            off = cut - self.realised(pruner, profile)
            if abs(off) <= near or abs(off) > 0.2 or pruner.removed:
                break
            wanted = min(max(wanted + off, 0.0), 0.99)
            try:
                pruner = placed(wanted)
            except OutOfReach:
                break
        return pruner

    def realised(self, pruner, profile):
        from ftp_lightning.pruning.request import realised_cut

        trace = self.prefilled(pruner, self.prompts(profile).ids)
        return realised_cut(self.model, pruner, trace, profile.new_tokens)

    def prompts(self, profile):
        """One random prompt of the profile's length, always the same."""
        import torch

        from ftp_lightning.evaluation.speed.prompts import random_prompts

        generator = torch.Generator().manual_seed(0)
        return random_prompts(self.model, profile.prompt_tokens, 1, generator=generator)

    def router(self, name, form, seed, cut, profile):
        """(cut, router trained at it) of the nearest cut of `--trained_at` that the peer reaches."""
        from ftp_lightning.pruning.budget import OutOfReach

        at = numbers(self.args.trained_at) if self.args.trained_at else [cut]
        for near in sorted(at, key=lambda one: abs(one - cut)):
            key = f"{profile.new_tokens}-{near}-{name}-{form}-{self.args.kv}-{seed}"
            if key not in self.trained:
                try:
                    pruner = self.placed(name, form, seed, near, profile)
                except OutOfReach as error:
                    reason = error
                    continue
                self.train(pruner, seed, self.args.output / "trained" / key)
                self.trained[key] = pruner.router
            return near, self.trained[key]
        raise reason

    def train(self, pruner, seed, place):
        from ftp_lightning.lit.fitting import fit_router
        from ftp_lightning.lit.training_settings import TrainingSettings

        args = self.args
        settings = TrainingSettings(steps=args.steps, validations=3, seed=seed)
        count = settings.steps * settings.batch_size
        # seeds as in experiments/routers.py: rows of their own, not those of the calibration
        rows = study.search_windows(self.tokenizer, args.train, "training", count, 100 + seed)
        held = study.search_windows(self.tokenizer, args.validation, "validation", args.calibration_windows, 200 + seed)
        fit_router(self.model, pruner, rows, held, settings, place, fingerprint=f"{place.name}-{count}")

    def measure(self, pruner, profile, timed):
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
            **self.costs(pruner, profile, timed),
        }

    def prefilled(self, pruner, ids):
        import torch

        with torch.no_grad(), pruner(self.model):
            self.model(input_ids=ids.to(self.model.device), use_cache=True, logits_to_keep=1)
        return pruner.trace.prompt

    def costs(self, pruner, profile, timed):
        """On a random prompt of the profile's length: realised cut of the request, bytes, time."""
        from ftp_lightning.pruning.flops import cached_bytes
        from ftp_lightning.pruning.request import kept_bytes, realised_cut
        from ftp_lightning.schedule import Schedule

        prompts = self.prompts(profile)
        trace = self.prefilled(pruner, prompts.ids)
        dense = Schedule.uniform(len(pruner.kv), 0.0)
        every = cached_bytes(self.model, dense, profile.prompt_tokens, "evict")
        found = {
            "realised_cut": realised_cut(self.model, pruner, trace, profile.new_tokens),
            "kv_share": kept_bytes(self.model, pruner, trace) / every,
        }
        return found | (self.times(pruner, profile, prompts) if timed and self.args.pairs else {})

    def times(self, pruner, profile, prompts):
        """Milliseconds and speed-up of the prefill, and of a decoding step where the profile has any."""
        import torch

        from ftp_lightning.evaluation.speed.prefill import decode_speed, prefill_speed

        about = {"generator": torch.Generator().manual_seed(0), "clock": CLOCKS[self.args.clock]}
        found, measures = {}, {"prefill": functools.partial(prefill_speed, warmup=1)}
        measures |= {"decode": decode_speed} if profile.new_tokens else {}
        for name, measure in measures.items():
            measured = measure(self.model, pruner, prompts, self.args.pairs, **about)
            found |= {f"{name}_ms": measured.pruned_ms, f"{name}_dense_ms": measured.dense_ms}
            found |= {f"{name}_speedup": measured.ratio.value}
        return found


def sizes_of(args):
    """What a row was measured at; a row of other sizes is measured anew."""
    names = ("items", "windows", "dtype", "prompt_tokens", "new_tokens", "compensation", "steps", "trained_at")
    return [getattr(args, name) for name in names] + ([args.least] if args.least else [])


def jobs_of(args):
    """(profile, cut, peer, schedule, seed) of what this process measures: the first seed of everything first, and of
    each seed the peers in the order given."""
    cells = study.own_cells(args, itertools.product(args.profiles.split(","), numbers(args.cuts)))
    found = [(*cell, *row) for cell in cells for row in rows_of(args, cell[1])]
    return sorted(found, key=lambda job: (job[4], args.peers.index(job[2])))


def run(args):
    args.output.mkdir(parents=True, exist_ok=True)
    bench = None
    for profile, cut, name, form, seed in jobs_of(args):
        target, key = args.output / f"{profile}-{cut}-{args.kv}.json", f"{name} {form} {seed}"
        known = json.loads(target.read_text()) if target.exists() else {}
        if known.get(key, {}).get("sizes") == sizes_of(args):
            continue
        bench, start = bench or Bench(args), time.process_time()
        row = {"sizes": sizes_of(args), "peer": name, "schedule": form, "profile": profile, "cut": cut, "seed": seed}
        known[key] = row = schedules.compact(row | measured(bench, name, form, seed, cut, profile))
        study.write(target, known)
        study.write(args.output / "dense.json", bench.test.dense)
        said = row.get("unreachable") or f"kept {row['kept']['share']:.3f}, KL {row['kl']:.4f}"
        print(
            f"{profile} {cut:.0%} {name} {form} seed {seed}: {said} ({time.process_time() - start:.0f} s)", flush=True
        )


def measured(bench, name, form, seed, cut, profile):
    """The numbers of one row, or why there are none."""
    from ftp_lightning.pruning.budget import OutOfReach

    request, first = profile_of(bench.args, profile), seed == min(map(int, bench.args.seeds.split(",")))
    try:
        pruner, trained_at = bench.ready(name, form, seed, cut, request)
    except OutOfReach as error:
        return {"unreachable": str(error).splitlines()[0]}
    told = {"trained_at": trained_at, "folder": getattr(bench.peers[name], "taken", None)}
    told = {what: value for what, value in told.items() if value is not None}
    return bench.measure(pruner, request, timed=first) | told


def main():
    args = arguments()
    if not args.tables:
        run(args)
    tables.report(args)


if __name__ == "__main__":
    main()
