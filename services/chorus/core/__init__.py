"""Decisions only: pure and typed, no clock, no I/O. `now` and `rng` come in as arguments."""
