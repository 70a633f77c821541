"""A mesh of a thousand nodes in one process: the pure core, driven by a discrete-event simulation."""

from chorus.sim.machines import Fleet, Machine, Trouble, make_fleet
from chorus.sim.policies import Asking, Chorus, Ended, LeastLoaded, Policy, RoundRobin, TwoChoices
from chorus.sim.world import Outcome, Plan, World, simulate

__all__ = [
    "Asking",
    "Chorus",
    "Ended",
    "Fleet",
    "LeastLoaded",
    "Machine",
    "Outcome",
    "Plan",
    "Policy",
    "RoundRobin",
    "Trouble",
    "TwoChoices",
    "World",
    "make_fleet",
    "simulate",
]
