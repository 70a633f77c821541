"""What users of the package and its own tests share: a fake engine, an engine's conformance suite, a whole mesh."""
