"""What pruning costs and saves, counted: FLOPs, bytes, budgets."""
