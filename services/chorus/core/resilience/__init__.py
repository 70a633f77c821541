"""What is done when something has failed: whether, when and where to try again."""
