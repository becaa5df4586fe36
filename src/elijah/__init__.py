"""Find and remove backdoors in diffusion models.

scan, clean, load_model, Report and Trigger are imported when they are first asked for: `import elijah` needs no torch.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from elijah.clean import clean
    from elijah.loading import load_model
    from elijah.report import Report
    from elijah.scan import scan
    from elijah.trigger import Trigger

__all__ = ["Report", "Trigger", "__version__", "clean", "load_model", "scan"]

__version__ = "0.1.0"

_HOMES = {
    "scan": "elijah.scan",
    "clean": "elijah.clean",
    "load_model": "elijah.loading",
    "Report": "elijah.report",
    "Trigger": "elijah.trigger",
}


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value: object = getattr(import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """elijah.scan and elijah.clean are the functions, also after the import system binds the modules of that name."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
