"""What requests cost: prices of paid providers, the budget that they are asked within, and the ledger's records."""

from chorus.core.costs.bills import Bill, Tab
from chorus.core.costs.budget import Books, Limits, Period, Shortage, shortage
from chorus.core.costs.prices import MICRO, Price, Prices
from chorus.core.costs.purse import Purse, Unaffordable
from chorus.core.costs.records import Asked, Entry, Grouping, Line, Report, Where

__all__ = [
    "MICRO",
    "Asked",
    "Bill",
    "Books",
    "Entry",
    "Grouping",
    "Limits",
    "Line",
    "Period",
    "Price",
    "Prices",
    "Purse",
    "Report",
    "Shortage",
    "Tab",
    "Unaffordable",
    "Where",
    "shortage",
]
