"""Repairs, one method a file: a frozen dataclass called on a backdoored model and what the scan found."""

from elijah.repairs.elijah import Elijah
from elijah.repairs.finetune import FineTune
from elijah.repairs.prune import Prune
from elijah.repairs.unshift import Unshift

REPAIRS = {"unshift": Unshift, "elijah": Elijah, "prune": Prune, "finetune": FineTune}
DEFAULT = "unshift"
