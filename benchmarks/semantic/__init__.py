"""Questions that have one answer and ones that nearly have: what the answer cache's gate is trained and judged on."""
