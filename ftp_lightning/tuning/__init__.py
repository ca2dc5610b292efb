"""From prompts and a share of answers to keep, to the pruner that saves most; stage `tune` calls it."""
