"""Lightning systems without formulas: they receive a model and drive it over batches."""
