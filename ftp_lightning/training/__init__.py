"""What only training needs of the pruning core: gates, gradients of keys, resuming from a block, compensation."""
