"""Evaluation: datasets, scores, statistics, and the run of a dataset through a mesh. `chorus eval` is its command."""
