"""Stages: each reads its inputs, calls one part of the package and writes a folder. One file holds flags and work."""
