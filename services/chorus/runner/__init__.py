"""The runner: one machine's models, served to the mesh and reported to its registries."""
