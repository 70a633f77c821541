"""Which requests a coordinator takes on, which wait for their turn, and which are refused at once."""

from chorus.core.admission.queue import RETRY_MIN_S, AdmissionQueue, Capacity, Ticket, Turn

__all__ = ["RETRY_MIN_S", "AdmissionQueue", "Capacity", "Ticket", "Turn"]
