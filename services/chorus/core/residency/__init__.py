"""Which models are in a runner's memory, where in it, and who makes room for whom."""
