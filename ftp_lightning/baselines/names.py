"""Names of all methods, without anything heavy behind them: flags and help read these.

`registry.METHODS` has the classes; a test holds the two together.
"""

EQUAL_TOKENS = ("random", "uniform", "first_dense", "block_influence", "static")
"""Compared at the mean token sparsity and kv mode of the pruner asked about, as the paper compares."""

EQUAL_FLOPS = (
    "default", "late_blocks", "last_block_free", "deletion_recent", "deletion_random", "deletion_surprisal",
    "short_gpt", "recent_sink", "lazy_llm", "fast_kv", "gem_filter", "ffn_only", "spatten", "zero_tprune",
)  # fmt: skip
"""Compared at the prefill FLOPs of the pruner asked about; they need no training, `short_gpt` a sensitivity.json."""

NEEDS_SENSITIVITY = ("block_influence", "short_gpt")
