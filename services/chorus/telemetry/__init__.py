"""What a process tells about itself: logs, metrics, and the identifiers that follow a request over every hop."""
