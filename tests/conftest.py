"""What holds for every test."""

from __future__ import annotations

import signal

import structlog
from hypothesis import HealthCheck, settings

# How long an example takes, or its making, says how busy the machine is, and nothing of what is tested.
settings.register_profile("chorus", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("chorus")

# A shell starts background jobs with SIGINT ignored, and what is ignored stays so in every program that is started from
# there. Tests that interrupt a program as Ctrl-C would must find it listening, however they were started themselves.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# What is logged is captured with a failed test's output: all of it, as structlog prints by itself.
structlog.configure()
