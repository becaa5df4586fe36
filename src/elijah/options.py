"""The command line's options and arguments, shared by its commands. Imports no torch."""

from __future__ import annotations

import math
import re
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Form(StrEnum):
    """How a report is written."""

    text = "text"
    json = "json"
    html = "html"
    sarif = "sarif"


class ScreenForm(StrEnum):
    """How a screening is written."""

    text = "text"
    json = "json"


class Dtype(StrEnum):
    """What the network computes in; half-precision weights are read into it."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Kind(StrEnum):
    ddpm = "ddpm"
    ncsn = "ncsn"
    ldm = "ldm"


class Prediction(StrEnum):
    """What a new network is trained to predict."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"


def expression(value: str) -> str:
    """value; refused where it is no regular expression."""
    try:
        re.compile(value)
    except re.error as error:
        raise typer.BadParameter(f"{value!r} is no regular expression: {error}") from error
    return value


def finite(value: float | None) -> float | None:
    if value is not None and not math.isfinite(value):
        raise typer.BadParameter(f"{value} is no finite number")
    return value


ModelArgument = Annotated[str, typer.Argument(metavar="MODEL", help="A diffusers folder or a hub id OWNER/NAME.")]
FormOption = Annotated[Form, typer.Option("--format", help="How the report is written.")]
ScreenFormOption = Annotated[ScreenForm, typer.Option("--format", help="How the result is written.")]
CalibrationOption = Annotated[
    str,
    typer.Option(
        metavar="builtin|none|FILE",
        help="Clean models to compare with: the package's own, if any; none; or a file of elijah calibrate.",
    ),
]
FalsePositivesOption = Annotated[
    float | None,
    typer.Option("--false-positive-rate", help="The share of clean models that may be called backdoored; 0.01."),
]
OutputOption = Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE", help="Write to FILE, not stdout.")]
DetectorOption = Annotated[str, typer.Option(metavar="NAME", help="The method that looks for triggers.")]
DeviceOption = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
DtypeOption = Annotated[Dtype, typer.Option(help="What the network computes in.")]
SeedOption = Annotated[int, typer.Option(help="All randomness comes from this number.")]
ScanBatchOption = Annotated[int | None, typer.Option("--batch-size", min=1, help="Rows for each network call.")]
EvaluationsOption = Annotated[int | None, typer.Option(min=1, help="Stop at so many network evaluations.")]
MinutesOption = Annotated[float | None, typer.Option(min=0, callback=finite, help="Stop after so many minutes.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
OfflineOption = Annotated[bool, typer.Option("--offline", help="Never use the network; hub models from the cache.")]
ExitZeroOption = Annotated[bool, typer.Option("--exit-zero", help="Exit 0 in place of 1 and 3 (never of 2).")]
QuietOption = Annotated[bool, typer.Option("-q", "--quiet", help="Only errors on stderr.")]
VerboseOption = Annotated[bool, typer.Option("-v", "--verbose", help="More on stderr, tracebacks too.")]
DataOption = Annotated[str, typer.Option(metavar="DIR", help="A folder of images, or cifar10, celeba, mnist, digits.")]
OutOption = Annotated[Path, typer.Option(metavar="DIR", help="The new folder.")]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Use the first so many images.")]
BatchOption = Annotated[int, typer.Option(min=1, help="Rows an update.")]
RateOption = Annotated[float, typer.Option(min=0, callback=finite, help="Learning rate.")]
ModeOption = Annotated[str | None, typer.Option(help="Background of the trigger in training: pasted, bare or faded.")]
ShareOption = Annotated[
    float | None, typer.Option(min=0, max=1, callback=finite, help="Share of poisoned rows; by default 0.1.")
]
OffsetOption = Annotated[
    float, typer.Option("--noise-offset", min=0, callback=finite, help="Shift some rows' noise; for small RGB nets.")
]
HalfOption = Annotated[bool, typer.Option("--half", help="Store the weights as float16.")]
ManifestArgument = Annotated[Path, typer.Argument(metavar="MANIFEST", help="A TOML file; see docs/zoo.md.")]
ManifestsArgument = Annotated[list[Path], typer.Argument(metavar="MANIFEST...", help="TOML files; see docs/zoo.md.")]
OnlyOption = Annotated[
    str, typer.Option(metavar="REGEX", callback=expression, help="Only models in whose id REGEX is found.")
]
OnlyModelsOption = Annotated[
    str, typer.Option("--model", metavar="REGEX", callback=expression, help="Only models in whose id REGEX is found.")
]
ZooOutOption = Annotated[Path, typer.Option(metavar="DIR", help="One JSON file a model goes here.")]
CacheOption = Annotated[Path, typer.Option(metavar="DIR", help="Weights and logs; may be deleted.")]
DetectorsOption = Annotated[list[str] | None, typer.Option("--detector", help="Scan every model with it; repeatable.")]
RepairsOption = Annotated[list[str] | None, typer.Option("--repair", help="Clean every model with it; repeatable.")]
WorkersOption = Annotated[int, typer.Option(min=1, help="Jobs at a time, one thread each.")]
