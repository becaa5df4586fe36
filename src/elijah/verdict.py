"""Verdicts with a p-value: how a model's suspicion compares with that of clean models scanned alike. No torch.

The p-value is the share of clean models of the same kind that look as suspicious, the model itself counted among them
(conformal, Vovk et al. 2005): if the model is clean and like them, p <= rate has at most the probability rate.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from elijah import __version__
from elijah.errors import ElijahError
from elijah.files import write_file

DEFAULT_RATE = 0.01
LOOSE = (
    0.05  # a rate above this, where nobody asked for one, calls nothing backdoored that the detector's rule does not
)
BUILTIN = Path(__file__).parent / "calibrations"  # NAME-OF-THE-DETECTOR.json, where one ships
TAIL = 4  # of so many clean scores, the highest is of the tail
FEWEST_IN_TAIL = 5
LARGEST = 2**24  # bytes of a calibration or of one result; a larger file is not read
SMALLEST_RATE = 1e-6
Side = Annotated[int, Field(ge=1, le=4096)]
Name = Annotated[str, Field(min_length=1, max_length=200)]


class Strict(BaseModel):
    """Known keys only, right types only, finite numbers only, never changed in place."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, frozen=True, strict=True)


class CleanModel(Strict):
    """A clean model and how suspicious the detector found it. sample_shape: C, H, W; base: what it was trained from."""

    id: Name
    base: Name
    kind: Name
    sample_shape: tuple[Side, Side, Side]
    parameters: int = Field(ge=1, le=2**63 - 1)
    score: float


@dataclass(frozen=True)
class Judgement:
    """A calibrated verdict. p_value: None where there is none to give; out_of_range: in what the model is unlike.

    rate: the false positive rate that the verdict claims. fitted_tail: see fitted_tail; no verdict depends on it.
    """

    verdict: str
    reason: str
    p_value: float | None
    out_of_range: list[str]
    clean_models: int  # that the score was compared with
    rate: float
    fitted_tail: float | None = None


class Calibration(Strict):
    """Clean models and their suspicion under one detector. command: what made it."""

    schema_version: Literal[1] = 1
    id: str = Field(pattern=r"^[\w.-]{1,100}$")
    detector: Name
    tool_version: Name = __version__
    command: str = Field(max_length=10_000)
    clean: list[CleanModel] = Field(min_length=1, max_length=100_000)

    @model_validator(mode="after")
    def _no_model_counts_twice(self) -> Calibration:
        name, count = Counter(m.id for m in self.clean).most_common(1)[0]
        if count > 1:
            raise ValueError(f"two models are called {name}")
        return self

    def to_json(self) -> str:
        """The document, with a newline at its end."""
        return self.model_dump_json(indent=1) + "\n"

    @property
    def sha256(self) -> str:
        """Of to_json(), so of the file that write made."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()

    def write(self, file: Path) -> None:
        """Writes the document in full or not at all; raises ElijahError when it cannot."""
        write_file(file, self.to_json())

    def of_kind(self, kind: str) -> list[CleanModel]:
        """The clean models of a kind: ddpm, ncsn or ldm."""
        return [m for m in self.clean if m.kind == kind]

    def p_value(self, score: float, kind: str) -> float:
        """(1 + how many of the n clean models of the kind score at least as much) / (n + 1)."""
        scores = [m.score for m in self.of_kind(kind)]
        return (1 + sum(s >= score for s in scores)) / (1 + len(scores))

    def rate_for(self, kind: str) -> float:
        """The false positive rate that is claimed where none was asked for: DEFAULT_RATE, or the smallest that the
        clean models of the kind allow, if that is larger."""
        n = len(self.of_kind(kind))
        return max(DEFAULT_RATE, 1 / (n + 1)) if n else DEFAULT_RATE

    @property
    def far(self) -> float:
        """The score beyond which a model that is unlike these may be called backdoored: max + (max - median)."""
        scores = [m.score for m in self.clean]
        return 2 * max(scores) - statistics.median(scores)

    def out_of_range(self, kind: str, sample_shape: tuple[int, int, int], parameters: int) -> list[str]:
        """In what a model (sample_shape C, H, W) is unlike the clean ones of its kind: kind, or resolution, channels,
        parameters; empty when it is like them.

        Like: sides between their smallest and largest, a number of channels that one of them has, and no less than
        half the parameters of the smallest and no more than twice those of the largest.
        """
        same = self.of_kind(kind)
        if not same:
            return ["kind"]
        sides, counts = [side for m in same for side in m.sample_shape[1:]], [m.parameters for m in same]
        unlike = {
            "resolution": not all(min(sides) <= side <= max(sides) for side in sample_shape[1:]),
            "channels": sample_shape[0] not in {m.sample_shape[0] for m in same},
            "parameters": not min(counts) / 2 <= parameters <= 2 * max(counts),
        }
        return [word for word, found in unlike.items() if found]

    def check(self, detector: str, kind: str, rate: float) -> None:
        """Raises ElijahError where no claim at the rate is possible: another detector's scores, or too few models."""
        if detector != self.detector:
            raise ElijahError(f"calibration {self.id} is for the detector {self.detector}, not {detector}")
        if not SMALLEST_RATE <= rate < 1:  # NaN, too
            raise ElijahError(f"no false positive rate: {rate}; give one between {SMALLEST_RATE:f} and 1")
        n = len(self.of_kind(kind))
        if n and rate < 1 / (n + 1):
            raise ElijahError(
                f"calibration {self.id} has {n} clean {kind} models: a false positive rate of {rate:g} needs at least "
                f"{models_for(rate)}; the smallest rate that {n} allow is {1 / (n + 1):.3g}"
            )

    def judgement(
        self, rule: str, reason: str, score: float | None, kind: str, sample_shape: tuple[int, int, int],
        parameters: int, asked: float | None,
    ) -> Judgement:  # fmt: skip
        """The verdict on a model from the detector's fixed rule, with its reason, and its suspicion, None without one.

        sample_shape: C, H, W. asked: the false positive rate; None is rate_for, and if that is more than LOOSE, then
        only what the rule calls backdoored is. Raises ElijahError as check does.
        """
        rate = self.rate_for(kind) if asked is None else asked
        self.check(self.detector, kind, rate)
        unlike = self.out_of_range(kind, sample_shape, parameters)
        compared = len(self.clean if unlike else self.of_kind(kind))
        if score is None:
            return Judgement("undecided", f"{reason}; there is no score to compare", None, unlike, compared, rate)
        p = None if unlike else self.p_value(score, kind)
        verdict, suffix = judge(rule, p, rate, not unlike, score, self.far)
        suffix += f" ({', '.join(unlike)})" if unlike else ""
        if asked is None and rate > LOOSE and rule == "undecided" and verdict == "backdoored":
            verdict, suffix = "undecided", f"{suffix}, but of {compared} clean models that says little"
        tail = None if unlike else fitted_tail(score, [m.score for m in self.of_kind(kind)])
        return Judgement(verdict, f"{reason}; {suffix}", p, unlike, compared, rate, tail)


def fitted_tail(score: float, clean: list[float]) -> float | None:
    """The probability that a clean model scores at least as much, by an exponential tail fitted to the highest clean
    scores (a generalised Pareto distribution of shape 0; Pickands 1975): below 1 / (n + 1) too, but on an assumption.

    None where the score is not in the tail, and where too few clean scores are.
    """
    k, ordered = len(clean) // TAIL, sorted(clean)
    if k < FEWEST_IN_TAIL:
        return None
    begin, mean = ordered[-k - 1], statistics.mean(ordered[-k:])
    return None if score <= begin or mean <= begin else k / len(clean) * math.exp((begin - score) / (mean - begin))


def models_for(rate: float) -> int:
    """The fewest clean models n for which 1 / (n + 1) <= rate."""
    n = max(0, math.floor(1 / rate) - 2)
    while 1 / (n + 1) > rate:
        n += 1
    return n


def judge(rule: str, p: float | None, rate: float, in_range: bool, score: float, far: float) -> tuple[str, str]:
    """(verdict, why) from the detector's fixed rule and the comparison with clean models.

    rule: backdoored, clean or undecided. p: the p-value, used in range alone. far: Calibration.far, used out of range
    alone. In range, backdoored is said of at most the share rate of clean models, whatever the rule says.
    """
    if not in_range or p is None:
        return judge_unlike(rule, score, far)
    if p <= rate:
        if rule == "clean":
            return "undecided", f"but clean models are rarely as suspicious (p-value {p:.3g})"
        return "backdoored", f"clean models are rarely as suspicious (p-value {p:.3g})"
    if rule == "backdoored":
        return "undecided", f"but clean models are as suspicious too often (p-value {p:.3g})"
    return ("clean" if rule == "clean" else "undecided"), f"clean models are as suspicious (p-value {p:.3g})"


def judge_unlike(rule: str, score: float, far: float) -> tuple[str, str]:
    """What judge says out of range, where there is no p-value."""
    unlike = "the model is unlike the calibration's"
    if rule == "clean":
        return "clean", f"{unlike}, so there is no p-value"
    if rule == "backdoored" and score > far:
        return "backdoored", f"its suspicion is far beyond that of every clean model, though {unlike}"
    return "undecided", f"but {unlike}, so there is no p-value"


def read_bounded(file: Path) -> bytes:
    """A file's bytes. Raises ElijahError with one line that names the file when it is too large or cannot be read."""
    try:
        with file.open("rb") as opened:
            content = opened.read(LARGEST + 1)
    except OSError as error:
        raise ElijahError(f"{file}: cannot be read ({error.strerror})") from error
    if len(content) > LARGEST:
        raise ElijahError(f"{file}: more than {LARGEST} bytes")
    return content


def first_error(error: ValidationError) -> str:
    """Where a document is wrong and in what, in one line."""
    first = error.errors()[0]
    where = ".".join(str(key) for key in first["loc"])[:80] or "the document"
    return " ".join(f"{where}: {first['msg'][:200]}".split())


def find_calibration(choice: str, detector: str) -> Calibration | None:
    """The calibration that was chosen: builtin, the package's own for the detector, None where there is none; none,
    None; or else the one in the file of that name. Raises ElijahError as read_calibration does."""
    if choice == "none":
        return None
    if choice == "builtin":
        return read_calibration(BUILTIN / f"{detector}.json") if ships(detector) else None
    return read_calibration(Path(choice))


def ships(detector: str) -> bool:
    """Whether the package has a calibration of its own for the detector."""
    return (BUILTIN / f"{detector}.json").is_file()


def read_calibration(file: Path) -> Calibration:
    """The Calibration in a JSON file. Raises ElijahError with one line that names the file for anything else."""
    try:
        return Calibration.model_validate_json(read_bounded(file))
    except ValidationError as error:
        raise ElijahError(f"{file}: no calibration: {first_error(error)}") from error
