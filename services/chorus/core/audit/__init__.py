"""Who did what to which model, key, token or node: deeds, and the chain that they are kept in."""

from chorus.core.audit.deeds import Deed, DeedKind, Fact, NoTrail, Trail

__all__ = ["Deed", "DeedKind", "Fact", "NoTrail", "Trail"]
