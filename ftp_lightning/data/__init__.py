"""Text becomes token windows: stories and sources, splits, recall passages, windows, multiple-choice items."""
