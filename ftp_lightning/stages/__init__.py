"""Stages: read inputs, call one edge, write the run folder. One settings class per stage is its flags, its YAML and its help."""
