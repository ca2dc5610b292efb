"""Text becomes rows of tokens: stories and sources, splits, recall passages, windows, examples, multiple choice."""
