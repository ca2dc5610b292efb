"""A pruner on disk, and a base model loaded with it."""
