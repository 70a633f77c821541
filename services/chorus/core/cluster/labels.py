"""The labels of nodes by which the manifests decide what runs where."""

RUNNER_LABEL = "chorus.mesh/runner"
"""`true`: a runner belongs here."""

GPU_LABEL = "chorus.mesh/gpu"
"""`nvidia`: that runner is the one with CUDA."""

DRAIN_LABEL = "chorus.mesh/drain"
"""Any value: its runner is to leave."""
