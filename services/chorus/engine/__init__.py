"""What generates tokens: the interface, and the engines behind it."""
