"""The `chorus` command: arguments in, one call of the package, a table or JSON out."""
