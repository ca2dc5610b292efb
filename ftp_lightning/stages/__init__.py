"""Stages read inputs, call one edge, write a folder. A settings class is a stage's flags, its YAML and its help."""
