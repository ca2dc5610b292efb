"""How much does it matter which generated tokens skip blocks? The decode policies on tasks and perplexity.

    python experiments/decode_sensitivity.py --pruned runs/demo/finetune/pruned --tasks story_recall,story_name

Policies: `dense` (no generated token skips), `threshold` at 0.3 to 0.7 (paper: 0.5, tuned on WinoGrande), `strict`. The
prompt is pruned alike under all of them. Flags are those of `evaluate`, and --thresholds. The static router computes
every generated token, so only a trained or random one shows a difference.
"""

import argparse
import sys

DEFAULT = "0.3,0.4,0.5,0.6,0.7"


def policies(pruner, thresholds):
    """(name, pruner) of each policy; --decode of the pruner itself does not matter."""
    made = [("dense", pruner.changed(decode="dense"))]
    made += [(f"threshold {t:g}", pruner.changed(decode="threshold", threshold=t)) for t in thresholds]
    return [*made, ("strict", pruner.changed(decode="strict"))]


def measure(bench, name, pruner):
    """One row per task; text and its perplexity stand in each."""
    from ftp_lightning.evaluation.continuation import evaluate_rows

    found = bench.measure(name, pruner)
    evaluate_rows(bench.model, bench.windows, pruner, "prompt", bench.settings.batch_size, bench.teacher)
    shares = pruner.trace.sparsity  # of the last batch's continuation
    text = {"kl": found["kl"]["mean"], "ppl": found["ppl"]["prompt"], "skipped_text": sum(shares) / len(shares)}
    cells = found["tasks"].items()
    return [{"policy": name, "task": t, "score": c["acc"], **{k: c[k] for k in WANTED}, **text} for t, c in cells]


WANTED = ("metric", "n", "stderr", "low", "high", "skipped", "sparsity")


def table(rows):
    from ftp_lightning.evaluation.tables import Table, fixed, number, percent, text, with_error, with_interval

    columns = {
        "policy": text("policy"),
        "task": text("task"),
        "metric": text("metric"),
        "items": text("n"),
        "prompt skipped, %": percent("sparsity"),
        "answer skipped, %": percent("skipped"),
        "score, %": with_error("score", "stderr"),
        "score [95 %]": with_interval("score", "low", "high"),
        "text skipped, %": percent("skipped_text"),
        "KL": number("kl"),
        "PPL": fixed("ppl", 2),
    }
    note = "The text's continuation, and an answer's tokens that are fed, are what a decode policy may skip."
    return Table("decode_sensitivity", "Decode policies", columns, rows, (note,))


def run(thresholds, rest):
    from pathlib import Path

    from ftp_lightning.stages.measuring import Bench

    from ftp_lightning.__main__ import parse
    from ftp_lightning.artifact import make_folder, write_text
    from ftp_lightning.evaluation.tables import written
    from ftp_lightning.stages.inputs import load_model
    from ftp_lightning.stages.methods import choose_methods

    settings = parse("evaluate", ["--output", "runs/decode_sensitivity", *rest])
    if settings is None:
        return
    model, tokenizer = load_model(settings)
    pruner = choose_methods(settings, model)[-1][1]
    make_folder(settings.folder)
    answers = Path(settings.answers or settings.folder / "answers").expanduser()
    bench = Bench(settings, model, tokenizer, lambda what: print(what, file=sys.stderr, flush=True), answers=answers)
    bench.dense_results()
    rows = [row for name, one in policies(pruner, thresholds) for row in measure(bench, name, one)]
    for name, content in written([table(rows)]).items():
        write_text(settings.folder / name, content)
    print(table(rows).markdown())


def main():
    from ftp_lightning.__main__ import hush
    from ftp_lightning.errors import UserError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--thresholds", default=DEFAULT)
    args, rest = parser.parse_known_args()
    hush()
    try:
        run([float(t) for t in args.thresholds.split(",")], rest)
    except UserError as error:
        print(error, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
