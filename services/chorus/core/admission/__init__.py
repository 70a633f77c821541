"""Which requests a coordinator takes on, which wait for their turn, and which are refused at once."""

from chorus.core.admission.queue import AdmissionQueue, Capacity, Ticket, Turn

__all__ = ["AdmissionQueue", "Capacity", "Ticket", "Turn"]
