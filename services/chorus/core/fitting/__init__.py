"""What fits where: the memory that a model needs, and which models suit a machine."""
