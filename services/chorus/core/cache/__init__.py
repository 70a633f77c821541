"""Answers given before: which requests may have them, whether two questions have one answer, and at which risk."""
