"""Names of the tasks that are made here. Light, so that the command line can name them at once."""

OURS = ("story_recall", "story_ending", "story_name")
"""The embedded sets; what `evaluate` runs by default."""

LONG = ("multi_key_recall", "document_qa", "question_first", "question_both", "rephrased_recall")
"""Long-context tasks made at `--prompt_tokens` from the stage's own text."""

NIAH = ("ruler_niah_single", "ruler_niah_multikey", "ruler_niah_multivalue", "ruler_niah_multiquery")
"""RULER's needles in a haystack, which is the stage's own text."""

RULER = (*NIAH, "ruler_vt", "ruler_cwe", "ruler_fwe", "ruler_qa")
"""RULER's tasks by lm-eval's definitions, at `--prompt_tokens`; ruler_qa asks SQuAD's records."""

READING = ("squad", "squad_long")
"""Questions on a passage, alone or between passages of other articles up to `--prompt_tokens`."""

LAST_WORD = "lambada_stories"
"""The last word of a passage of the stage's own text."""

GENERATED = (*RULER, *READING)
"""Tasks whose answer is generated and searched for the gold answers."""

TWINNED = ("story_recall", *LONG, *GENERATED, LAST_WORD)
"""Tasks whose answer is in the passage; each has a twin NAME_deleted, the same without what holds the answer."""

MADE = (*OURS, *LONG, *GENERATED, LAST_WORD)
"""All of them; every other task is lm-eval's own."""
