"""Imported before gRPC by whatever a person runs: its core tells of failed handshakes and lost connections on standard
error by itself, beside our own message, unless it is asked not to. The services of a mesh must hear it, so
`local.process` does not pass this on to them."""

from __future__ import annotations

import os

os.environ.setdefault("GRPC_VERBOSITY", "NONE")
