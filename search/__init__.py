"""Search: device models and the cost model; which choice each layer takes, within limits."""

from .allocate import Allocation, AllocationError, Choice, Infeasible, allocate
from .pareto import Front, pareto

__all__ = ["Allocation", "AllocationError", "Choice", "Front", "Infeasible", "allocate", "pareto"]
