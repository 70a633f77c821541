"""The one translation between generated messages and core types, and the one error table."""
