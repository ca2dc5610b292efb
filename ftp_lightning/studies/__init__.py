"""Studies: many runs of one question, from a wandb sweep file, and what they say together."""
