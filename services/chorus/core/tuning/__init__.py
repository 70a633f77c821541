"""How a model runs best on this machine: what to measure in which order, what the figures mean, what to propose."""
