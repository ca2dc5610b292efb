"""Draw docs/pictures/pareto.png from pareto.csv beside it: answers kept against measured time of the prefill.

The rows are those of docs/peers.md (commit 6a86a95, experiments/found/peers/peers.csv), means over seeds.
"""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pandas as pd

PICTURES = Path(__file__).parent / "pictures"
SHOWN = {
    "ftp_projected": ("ftp_lightning, projected router", "#0072b2", 2.8),
    "ftp_static": ("ftp_lightning, static router", "#56b4e9", 2.4),
    "deletion_recent": ("deletion of the oldest tokens", "#e69f00", 1.3),
    "block_pruner": ("BlockPruner", "#d55e00", 1.3),
    "fast_kv": ("FastKV", "#cc79a7", 1.3),
    "lazy_llm": ("LazyLLM", "#009e73", 1.3),
    "short_gpt": ("ShortGPT", "#7f7f7f", 1.3),
}


def main() -> None:
    rows = pd.read_csv(PICTURES / "pareto.csv")
    figure, axes = plt.subplots(figsize=(8, 4.2), dpi=130)
    for name, (label, colour, width) in SHOWN.items():
        found = rows[rows.method == name].sort_values("cut")
        axes.plot(found.times, found.kept, marker="o", markersize=4, color=colour, linewidth=width, label=label)
    axes.axvline(1.0, color="#bbbbbb", linewidth=1)
    axes.set(xlabel="prefill of 1,024 tokens, times as fast as dense", ylabel="answers kept, %")
    axes.set_title(
        "Up and to the right is better. 10 M model, cuts of 20 to 70 % of the FLOPs", fontsize=10, loc="left"
    )
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8.5)
    figure.tight_layout()
    figure.savefig(PICTURES / "pareto.png")


if __name__ == "__main__":
    main()
