"""Other methods behind the pruner's interface: one method = one class = one file, listed in `registry`."""
