"""A mesh on one machine: what `chorus up` starts, watches, restarts and stops."""
