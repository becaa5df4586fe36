"""The report: a typed document with a version number, the same for every command, detector and renderer. No torch.

One scan is one Report; a cleaning is one CleanReport, that is the Report of the rescan with what came before it.
Images travel inside as base64 PNG (png.py).
"""

from __future__ import annotations

import base64
import json
import math
import shlex
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from elijah import __version__
from elijah.errors import ElijahError

SCHEMA_VERSION = 1
EXIT_CODES: dict[str, int] = {"clean": 0, "backdoored": 1, "undecided": 3}
OPTIONS = (  # the settings that are options of the command line
    *("detector", "data", "synthetic", "repair", "force", "keep", "device", "dtype", "batch_size"),
    *("max_evaluations", "max_minutes", "offline"),
)
LARGEST_REPORT = 2**30  # bytes of a report file; a larger one is not read
LARGEST_TRIGGER = 2**22  # values; those of a larger trigger are not stored


def _encodable(value: object) -> object:
    """Text that UTF-8 can hold: the undecodable bytes of a file name become escapes."""
    return value.encode("utf-8", "backslashreplace").decode("utf-8") if isinstance(value, str) else value


Text = Annotated[str, BeforeValidator(_encodable)]
Png = Annotated[str, StringConstraints(pattern=r"^iVBORw0KGgo[A-Za-z0-9+/]*={0,2}$")]
Count = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=1, le=4096)]
Duration = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Scalar = bool | int | float | Text | None


class Part(BaseModel):
    """A part of the report: known keys only, finite numbers only, never changed in place."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True)


class ToolInfo(Part):
    """The program that wrote the report."""

    name: str = "elijah"
    version: str = __version__


class FileInfo(Part):
    """A file of the model that was read."""

    name: Text
    sha256: Sha256


class ModelInfo(Part):
    """Which model this is about. source: as the user named it; sample_shape: C, H, W."""

    source: Text
    revision: Text | None = None
    kind: str
    sample_shape: tuple[int, int, int]
    parameters: Count
    files: list[FileInfo] = []


class CalibrationInfo(Part):
    """The clean models that the scores were compared with, and whether this model is like them."""

    id: str
    sha256: Sha256
    clean_models: Count
    in_range: bool
    out_of_range: list[str] = []


class ThresholdInfo(Part):
    """The documented rule for one score: it speaks for a backdoor below or above value."""

    value: float
    backdoored: Literal["below", "above"]


class ResponseInfo(Part):
    """kappa, psi and gamma of the form that the network answers (elijah.response)."""

    kappa: float
    psi: float
    gamma: float = 1.0


class TriggerValues(Part):
    """The inverted trigger r in the units of start noise of variance 1: stamped noise is gamma e + r.

    shape: C, H, W of the network's input (latents for a latent model). base64: float16, little-endian, row by row.
    Raises ValidationError when there are too many values, not as many as shape says, or some that are not finite.
    """

    version: Literal[1] = 1
    shape: tuple[Side, Side, Side]
    dtype: Literal["float16"] = "float16"
    base64: Annotated[str, StringConstraints(max_length=8 * (LARGEST_TRIGGER // 3 + 1))]

    @model_validator(mode="after")
    def _holds_what_it_says(self) -> TriggerValues:
        if math.prod(self.shape) > LARGEST_TRIGGER:
            raise ValueError(f"a shape of more than {LARGEST_TRIGGER} values")
        if not np.isfinite(self.array).all():
            raise ValueError("values that are not finite")
        return self

    @property
    def array(self) -> NDArray[np.float64]:
        """r [C, H, W]. Raises ValueError when base64 does not hold as many values as shape says."""
        held, wanted = base64.b64decode(self.base64, validate=True), 2 * math.prod(self.shape)
        if len(held) != wanted:
            raise ValueError(f"{len(held)} bytes where shape {list(self.shape)} takes {wanted}")
        return np.frombuffer(held, "<f2").reshape(self.shape).astype(np.float64)


class TriggerInfo(Part):
    """An inverted trigger. norm: its L2 norm in the units of the start noise.

    values: the trigger itself, for screening; None in older reports and where it cannot be stored. patch [1, H, W]:
    1 where response.gamma holds, 0 elsewhere; None: it holds everywhere.
    """

    image_png: Png | None = None
    norm: Duration
    gamma_map_png: Png | None = None
    values: TriggerValues | None = None
    patch: TriggerValues | None = None


class TargetInfo(Part):
    """What the trigger leads to: one image, or a distribution of them."""

    kind: Literal["image", "distribution"]
    image_png: Png | None = None


class FindingInfo(Part):
    """One backdoor. loss_ratio: the attacker's loss over that of a clean network (1: clean, 0: fully backdoored)."""

    response: ResponseInfo
    matches: Text
    loss_ratio: float
    trigger: TriggerInfo
    target: TargetInfo | None = None


class SamplesInfo(Part):
    """Pictures drawn under one sampler from the same noise, with and without the trigger."""

    sampler: str
    samples_with_png: Png | None = None
    samples_without_png: Png | None = None


class EvidenceInfo(Part):
    """Pictures under the first of samplers; those under the others are in more."""

    samples_with_png: Png | None = None
    samples_without_png: Png | None = None
    samplers: list[str] = []
    more: list[SamplesInfo] = []

    def each(self) -> list[SamplesInfo]:
        """One entry for every sampler that has a picture."""
        name = self.samplers[0] if self.samplers else "sampler not recorded"
        first = SamplesInfo(
            sampler=name, samples_with_png=self.samples_with_png, samples_without_png=self.samples_without_png
        )
        return [s for s in [first, *self.more] if s.samples_with_png or s.samples_without_png]


class CostInfo(Part):
    """What the search took. network_evaluations: one a sample for a forward, two more for its backward."""

    network_evaluations: Count
    seconds: Duration
    network_seconds: Duration
    device: str


class CleaningInfo(Part):
    """What a repair did. before and after: the same numbers of the model as it was and as it is now.

    images: that were repaired with; dropped: that were left out before, and screening says why. rounds: of repair and
    rescan. findings: what was repaired, in the order in which it was found. harm: what the repair did to clean samples
    beyond the limits; empty when nothing. samples_*_png: from noise with the first trigger that was found.
    benign_*_png: from the same noise without it. out: the folder that was written, None when none was.
    """

    repair: str
    data: Text
    images: Count
    dropped: Count = 0
    screening: Text = "nothing was screened out"
    rounds: Count = 1
    updates: Count
    seconds: Duration
    findings: list[FindingInfo] = []
    harm: list[Text] = []
    before: dict[str, float] = {}
    after: dict[str, float] = {}
    samples_before_png: Png | None = None
    samples_after_png: Png | None = None
    benign_before_png: Png | None = None
    benign_after_png: Png | None = None
    out: Text | None = None


class Report(Part):
    """One scan. Raises pydantic's ValidationError for NaN, infinities, unknown keys, and findings when clean."""

    schema_version: Literal[1] = 1
    tool: ToolInfo = ToolInfo()
    model: ModelInfo
    verdict: Literal["backdoored", "clean", "undecided"]
    reason: Text
    p_value: Share | None = None
    false_positive_rate: Share | None = None
    calibration: CalibrationInfo | None = None
    scores: dict[str, float] = {}
    thresholds: dict[str, ThresholdInfo] = {}
    findings: list[FindingInfo] = []
    evidence: EvidenceInfo = EvidenceInfo()
    coverage: list[Text] = []
    not_covered: list[Text] = []
    cost: CostInfo
    settings: dict[str, Scalar | list[Scalar]] = {}
    seed: int
    errors: list[Text] = []
    cleaning: CleaningInfo | None = None

    @model_validator(mode="after")
    def _nothing_found_when_clean(self) -> Report:
        if self.verdict == "clean" and self.findings:
            raise ValueError("a clean report has no findings")
        return self

    @model_validator(mode="after")
    def _triggers_fit_the_model(self) -> Report:
        shape = self.model.sample_shape
        for trigger in (finding.trigger for finding in self.findings):
            if trigger.values is not None and trigger.values.shape != shape:
                raise ValueError(f"a trigger of shape {list(trigger.values.shape)} for a model of {list(shape)}")
            if trigger.patch is not None and trigger.patch.shape != (1, *shape[1:]):
                raise ValueError(f"a patch of shape {list(trigger.patch.shape)} for a model of {list(shape)}")
        return self

    @property
    def exit_code(self) -> int:
        """0 clean, 1 backdoored, 3 undecided."""
        return EXIT_CODES[self.verdict]

    def to_json(self) -> str:
        """The document, keys in the order of the class, with a newline at its end."""
        return self.model_dump_json(indent=2) + "\n"

    @staticmethod
    def from_json(text: str) -> Report:
        """The Report, or the CleanReport, that to_json wrote. Raises ElijahError with one line on anything else."""
        try:
            document = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ElijahError(f"not a report: no JSON document ({error})") from error
        if not isinstance(document, dict) or "schema_version" not in document:
            raise ElijahError("not a report: there is no schema_version")
        if document["schema_version"] != SCHEMA_VERSION:
            version = str(document["schema_version"])[:20]
            raise ElijahError(
                f"schema_version {version!r} is unknown here; elijah {__version__} reads {SCHEMA_VERSION}"
            )
        kind = CleanReport if "before" in document else Report
        try:
            return kind.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(key) for key in first["loc"]) or "the document"
            raise ElijahError(f"not a report: {where}: {first['msg']}") from error


class CleanReport(Report):
    """One cleaning: the Report of the rescan, with cleaning, and the Report of the scan before the repair.

    cleaning is None when the model was clean and nothing was written.
    """

    before: Report | None = None


def read_report(file: Path) -> Report:
    """The Report, or the CleanReport, in a JSON file. Raises ElijahError with one line that names the file."""
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST_REPORT + 1)
        if len(content) > LARGEST_REPORT:
            raise ElijahError(f"not a report: more than {LARGEST_REPORT} bytes")
        return Report.from_json(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise ElijahError(f"{file}: not a report: no UTF-8 text") from error
    except OSError as error:
        raise ElijahError(f"{file}: cannot be read ({error.strerror})") from error
    except ElijahError as error:
        raise ElijahError(f"{file}: {error}") from error


def clean_name(source: str) -> str:
    """A folder in the working directory for the cleaned model of a folder or hub id."""
    return (PurePosixPath(source).name or "model") + "-clean"


def command(report: Report) -> str:
    """The command line that makes this report again, quoted for a POSIX shell."""
    settings, model = dict(report.settings), report.model
    words = ["elijah", "scan", model.source]
    if isinstance(report, CleanReport):
        model = report.before.model if report.before else model
        out = report.cleaning.out if report.cleaning else None
        words = ["elijah", "clean", model.source, "--out", out or clean_name(model.source)]
    for name in OPTIONS:
        value = settings.get(name)
        if value is True:
            words.append("--" + name.replace("_", "-"))
        elif value is not None and value is not False:
            words += ["--" + name.replace("_", "-"), str(value)]
    if model.revision:
        words += ["--revision", model.revision]
    if report.calibration is not None and not isinstance(report, CleanReport):
        name = report.calibration.id
        words += ["--calibration", "builtin" if name == settings.get("detector") else f"{name}.json"]
        words += ["--false-positive-rate", str(report.false_positive_rate)]
    return shlex.join([*words, "--seed", str(report.seed)])


def finite(numbers: dict[str, float]) -> dict[str, float]:
    """numbers without NaN and infinities, which a report cannot hold."""
    return {name: float(value) for name, value in numbers.items() if np.isfinite(value)}


def trigger_values(r: NDArray[np.floating]) -> TriggerValues | None:
    """r [C, H, W] as a report stores it, rounded to float16; None when it is too large for that or not finite."""
    with np.errstate(over="ignore"):
        stored = np.ascontiguousarray(r, "<f2")
    if stored.size > LARGEST_TRIGGER or not np.isfinite(stored).all():
        return None
    channels, height, width = stored.shape
    return TriggerValues(shape=(channels, height, width), base64=base64.b64encode(stored.tobytes()).decode("ascii"))


def json_schema() -> dict[str, Any]:
    """The JSON schema of a report; that of a cleaning has the key before, too."""
    return CleanReport.model_json_schema()
