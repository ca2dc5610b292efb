"""Names of the tasks that are made here. Light, so that the command line can name them at once."""

OURS = ("story_recall", "story_ending", "story_name")
"""The embedded sets; what `evaluate` runs by default."""

LONG = ("multi_key_recall", "document_qa", "question_first", "question_both", "rephrased_recall")
"""Long-context tasks made at `--prompt_tokens` from the stage's own text."""
