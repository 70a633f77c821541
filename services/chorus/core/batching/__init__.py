"""Who decodes next: which requests wait, which have a slot, and what goes into the next batch."""
