"""What does it cost to train a router, in forwards of the dense model?  python experiments/training_cost.py --help

Every router is trained for `--steps` steps under one schedule (first block dense, the others equal: one_pass needs
that), each training beside dense forwards of the same rows, in turn, so that both meet the same machine. Times are
processor time of this process. Peak memory is what the process grew by while it trained, model and text loaded before.
`train`: the default of that stage, 200 steps of 4 windows, from the time of a step; its validations are left out.
"""

import argparse
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory

sys.path.insert(0, str(Path(__file__).parent))
import budgets as study
import routers

VARIANTS = {
    "dynamic": ("dynamic", {}),
    "local": ("local", {}),
    "recurrent": ("recurrent", {}),
    "hidden": ("hidden", {}),
    "hidden+factors": ("hidden+factors", {}),
    "one_pass": ("one_pass", {}),
    "projected": ("projected", {}),
    "projected, guide future": ("projected", routers.FUTURE),
}
"""Name -> router, and what differs from the training's defaults."""
PROMPT, CONTINUATION, DEFAULT_STEPS = 192, 64, 200


def arguments():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="embedded")
    parser.add_argument("--data", default="embedded")
    parser.add_argument("--budget", type=float, default=0.3)
    parser.add_argument("--kv", default="keep")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3, help="the least of so many times is told")
    parser.add_argument("--output", type=Path, default=Path("runs/training_cost.json"))
    parser.add_argument("--routers", default="; ".join(VARIANTS), help="separated by ;")
    args = parser.parse_args()
    args.routers = study.chosen(parser, args.routers, VARIANTS, "router")
    if args.steps < 2:
        parser.error("a step is timed from the end of the one before: give --steps of 2 at least")
    return args


class Bench:
    """Model, text and schedule that every router is trained with."""

    def __init__(self, args):
        from ftp_lightning.lit.training_settings import TrainingSettings
        from ftp_lightning.models import load
        from ftp_lightning.search.allocations import step

        self.args, self.batch = args, TrainingSettings().batch_size
        self.model, tokenizer = load(args.model, dtype=args.dtype)
        self.blocks = self.model.config.num_hidden_layers
        self.schedule = step(self.blocks, args.budget)
        self.rows = study.search_windows(tokenizer, args.data, "training", args.steps * self.batch, 0)
        self.tokens = self.rows.input_ids.numel()

    def train(self, name):
        """Processor seconds of a step, and the router's number of parameters."""
        from ftp_lightning import TokenPruner, make_router
        from ftp_lightning.data.module import RowsData
        from ftp_lightning.lit.fitting import fit
        from ftp_lightning.lit.router_training import RouterTraining
        from ftp_lightning.lit.training_settings import TrainingSettings

        kind, more = VARIANTS[name]
        router = make_router(kind, self.blocks, self.model.config.hidden_size)
        settings = TrainingSettings(steps=self.args.steps, batch_size=self.batch, validations=1, **more)
        system = RouterTraining(self.model, TokenPruner(router, self.schedule, self.args.kv), settings)
        data, ends = RowsData(self.rows, self.rows.subset(range(1)), self.batch, 0), []
        with TemporaryDirectory() as folder:
            fit(system, data, Path(folder), progress=lambda *step: ends.append(time.process_time()))
        return (ends[-1] - ends[0]) / (len(ends) - 1), router.parameter_count  # the first step follows a validation

    def dense(self):
        """Processor seconds of a step's rows in the dense model: one forward, no gradient, no output head."""
        import torch

        decoder, began = self.model.get_decoder(), time.process_time()
        with torch.no_grad():
            for start in range(0, len(self.rows), self.batch):
                decoder(input_ids=self.rows.input_ids[start : start + self.batch], use_cache=False)
        return (time.process_time() - began) / self.args.steps

    def measure(self, name):
        """What one variant costs."""
        import torch

        from ftp_lightning.evaluation.speed.memory import peak_bytes

        peak = peak_bytes(lambda: self.train(name), torch.device("cpu"), repeats=1)
        times = [(self.train(name), self.dense()) for _ in range(self.args.repeats)]
        step, dense = min(trained for (trained, _), _ in times), min(dense for _, dense in times)
        row = {"parameters": times[0][0][1], "tokens": self.rows.input_ids[0].numel() * self.batch, "step": step}
        return row | {"dense": dense, "forwards": step / dense, "peak": peak, "train": DEFAULT_STEPS * step}


def main():
    args = arguments()
    bench, rows = Bench(args), {}
    print("| router | parameters | a step, forwards | `train`, million tokens | processor time, s | peak memory, MB |")
    print("|---" * 6 + "|")
    bench.train(args.routers[0])  # what is imported once belongs to no router's peak
    for name in args.routers:
        rows[name] = row = bench.measure(name)
        tokens = DEFAULT_STEPS * row["tokens"] / 1e6
        print(
            f"| {name} | {row['parameters']:,} | {row['forwards']:.1f} | {tokens:.2f} | {row['train']:.0f} "
            f"| {row['peak'] / 1e6:.0f} |",
            flush=True,
        )
        args.output.parent.mkdir(parents=True, exist_ok=True)
        study.write(args.output, rows)


if __name__ == "__main__":
    main()
