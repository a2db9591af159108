"""Metrics as `evaluate` modules of this project, a folder each, loaded by path: see ADR 4."""
