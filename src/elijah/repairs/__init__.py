"""Repairs, one method a file: a frozen dataclass called on a backdoored model and what the scan found."""

from elijah.repairs.elijah import Elijah
from elijah.repairs.unshift import Unshift

REPAIRS = {"unshift": Unshift, "elijah": Elijah}
DEFAULT = "unshift"
