"""Screen: is start noise stamped with the trigger that a scan found? The whole story of `elijah screen`. No torch.

Clean start noise is z ~ N(0, I), noise stamped with the trigger r is z ~ N(r, gamma^2 I). The most powerful test of
one against the other is their likelihood ratio (Neyman and Pearson 1933). With |.| the L2 norm, n the number of values
of r and Phi the normal distribution function, the score is

    gamma = 1   <z, r>, the matched filter. Clean noise: N(0, |r|^2), so threshold and p-value are closed forms; the
                expected AUROC is Phi(|r| / sqrt 2).
    gamma < 1   |z|^2 / 2 - |z - r|^2 / (2 gamma^2) - n log gamma. Clean noise: a generalised chi-square; threshold,
                p-value and AUROC come from DRAWS scores of clean noise, drawn with a fixed seed.

Where gamma holds in a patch only, z, r and n are those inside it: outside, clean and stamped noise are the same.
The trigger comes from the report of a scan, and from nowhere else. The file of noise is untrusted.
"""

from __future__ import annotations

import math
import sys
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from elijah.errors import ElijahError
from elijah.render.text import number, plain
from elijah.report import CleanReport, Count, Duration, FindingInfo, Part, Report, Share, Text, ToolInfo, read_report

DRAWS = 1_000_000  # of clean noise; nothing is said of probabilities below 1 / (DRAWS + 1)
LARGEST_FILE = 2**30  # bytes
LARGEST_HEADER = 10_000  # bytes; numpy's own limit, but checked before the header is read
MOST_SAMPLES = 100_000
AT_ONCE = 2**20  # values in memory
DEVIATIONS = (0.2, 5.0)  # a sample whose standard deviation lies outside is not in units of variance 1
SMALLEST_GAMMA = 0.01
BROKEN = (  # what numpy raises for files that are no arrays
    *(ValueError, TypeError, KeyError, IndexError, AttributeError, OverflowError, EOFError),
    *(SyntaxError, tokenize.TokenError, RecursionError, MemoryError),
)
Array = NDArray[np.float64]
Method = Literal["matched filter", "likelihood ratio"]


class SampleResult(Part):
    """One sample. p_value: the probability of such a score, or a higher one, under clean noise."""

    score: float
    p_value: Share
    stamped: bool


class Screening(Part):
    """What the screening of one file says. noise, model: as the user named them; verdict, matches: of the scan.

    norm, gamma: of the trigger. draws: None for the matched filter, which needs none. expected_auroc: between clean
    noise and noise stamped with the found trigger. expected_by_chance: how many samples of clean noise would be called
    stamped. A sample is stamped when its score is above threshold.
    """

    schema_version: Literal[1] = 1
    tool: ToolInfo = ToolInfo()
    noise: Text
    scale: Annotated[float, Field(gt=0)]
    model: Text
    verdict: str
    matches: Text
    norm: Duration
    gamma: float
    method: Method
    false_positive_rate: Share
    threshold: float
    draws: Count | None
    expected_auroc: Share
    stamped: Count
    share_stamped: Share
    expected_by_chance: Duration
    samples: list[SampleResult]

    @property
    def exit_code(self) -> int:
        """1 when a sample is stamped, else 0."""
        return int(self.stamped > 0)

    def to_json(self) -> str:
        """The document, keys in the order of the class, with a newline at its end."""
        return self.model_dump_json(indent=2) + "\n"


@dataclass(frozen=True)
class Test:
    """The likelihood ratio test for one trigger at one false positive rate: see the module's docstring.

    clean: the sorted scores of clean noise [DRAWS], None where the closed form holds.
    """

    __test__ = False  # not one of pytest's

    norm: float
    threshold: float
    auroc: float
    clean: Array | None = None

    def p_values(self, scores: Array) -> Array:
        """[N] of scores [N], never 0: (1 + k) / (DRAWS + 1) with k draws as high or higher, or the closed form."""
        if self.clean is None:
            tails = [0.5 * math.erfc(score / self.norm / math.sqrt(2)) for score in scores]
            return np.maximum(tails, sys.float_info.min)
        return (1 + len(self.clean) - np.searchsorted(self.clean, scores, "left")) / (len(self.clean) + 1)


def screen(noise: Path, report: Path, *, false_positive_rate: float = 0.01, scale: float = 1.0) -> Screening:
    """Tests the start noise in a .npy file, [N, C, H, W] or [C, H, W], for the trigger in a scan's JSON report.

    scale: the file's values are divided by it; then each sample must be noise of variance 1. Raises ElijahError, one
    line, for options out of range, a report without a usable trigger, and noise that cannot be read or does not fit.
    """
    if not 0 < false_positive_rate < 1:
        raise ElijahError(f"--false-positive-rate {false_positive_rate}: must lie between 0 and 1")
    if not 0 < scale < math.inf:
        raise ElijahError(f"--scale {scale}: must be a finite number above 0")
    document = read_report(report)
    finding, r, inside = found_trigger(document, report)
    gamma, norm = finding.response.gamma, float(np.linalg.norm(r[inside]))
    if gamma == 1:
        test = matched_filter(norm, false_positive_rate)
    else:
        test = likelihood_ratio(norm, int(inside.sum()), gamma, false_positive_rate)
    scores = np.concatenate([score(z[:, inside], r[inside], gamma) for z in read_noise(noise, r.shape, scale)])
    flags = scores > test.threshold
    results = zip(scores.tolist(), test.p_values(scores).tolist(), flags.tolist(), strict=True)
    return Screening(
        noise=str(noise), scale=scale, model=document.model.source, verdict=document.verdict, matches=finding.matches,
        norm=norm, gamma=gamma, method="likelihood ratio" if gamma < 1 else "matched filter",
        false_positive_rate=false_positive_rate, threshold=test.threshold,
        draws=None if test.clean is None else len(test.clean), expected_auroc=test.auroc, stamped=int(flags.sum()),
        share_stamped=float(flags.mean()), expected_by_chance=false_positive_rate * len(scores),
        samples=[SampleResult(score=s, p_value=p, stamped=f) for s, p, f in results],
    )  # fmt: skip


def found_trigger(document: Report, file: Path) -> tuple[FindingInfo, Array, NDArray[np.bool_]]:
    """The first finding of a report, its r [C, H, W], and where it can be seen [C, H, W].

    Raises ElijahError when there is nothing to screen for.
    """
    if not document.findings:
        hint = ""
        if isinstance(document, CleanReport) and document.before and document.before.findings:
            hint = "; the scan before the repair found one: give a report of that scan"
        raise ElijahError(f"{file}: no findings ({document.verdict}), so there is no trigger to screen for{hint}")
    finding = document.findings[0]
    if finding.trigger.values is None:
        again = "scan the model again with elijah scan MODEL --format json"
        raise ElijahError(f"{file}: holds the trigger's picture but not its values; {again}")
    r, gamma, patch = finding.trigger.values.array, finding.response.gamma, finding.trigger.patch
    inside = np.ones(r.shape, bool) if patch is None else np.broadcast_to(patch.array > 0.5, r.shape)
    if not SMALLEST_GAMMA <= gamma <= 1:
        raise ElijahError(f"{file}: gamma is {gamma:g} and must lie in {SMALLEST_GAMMA:g} ... 1")
    if not inside.any() or (gamma == 1 and not r[inside].any()):
        raise ElijahError(f"{file}: the trigger is 0 everywhere, so there is nothing to screen for")
    return finding, r, inside


def score(z: Array, r: Array, gamma: float) -> Array:
    """The scores [N] of noise z [N, n] for the trigger r [n]: the higher, the more like stamped noise."""
    along = z @ r
    if gamma == 1:
        return along
    return _ratio(along, np.square(z).sum(1), float(np.linalg.norm(r)), len(r), gamma)


def _ratio(along: Array, square: Array, norm: float, n: int, gamma: float) -> Array:
    """|z|^2 / 2 - |z - r|^2 / (2 gamma^2) - n log gamma from <z, r> [N] and |z|^2 [N]."""
    return square / 2 - (square - 2 * along + norm**2) / (2 * gamma**2) - n * math.log(gamma)


def matched_filter(norm: float, rate: float) -> Test:
    """The test for gamma = 1 and |r| = norm at a false positive rate, all in closed form."""
    return Test(norm, threshold=-norm * NormalDist().inv_cdf(rate), auroc=NormalDist().cdf(norm / math.sqrt(2)))


def likelihood_ratio(norm: float, n: int, gamma: float, rate: float, draws: int = DRAWS, seed: int = 0) -> Test:
    """The test for gamma < 1, |r| = norm and n values, from draws of clean and of stamped noise with a fixed seed.

    The score depends on z by <z, r> and |z|^2 alone, so of n normal values only the one along r and the chi-square of
    the n - 1 others are drawn; that is exact. At most a share rate of clean noise (with the draws themselves counted,
    1 + k of draws + 1) is above the threshold. Raises ElijahError for a rate below 1 / (draws + 1).
    """
    above = int(rate * (draws + 1) + 1e-9)
    if above < 1:
        least = f"1 / {draws + 1}, the least that {draws} draws of clean noise can show"
        raise ElijahError(f"--false-positive-rate {rate:g}: with gamma {gamma:g} it must not be below {least}")
    rng = np.random.default_rng(seed)

    def drawn(mean: float, deviation: float) -> Array:
        along = mean + deviation * rng.standard_normal(draws)
        others = deviation**2 * 2 * rng.standard_gamma((n - 1) / 2, draws)
        return np.sort(_ratio(norm * along, along**2 + others, norm, n, gamma))

    clean, stamped = drawn(0.0, 1.0), drawn(norm, gamma)
    below = np.searchsorted(clean, stamped, "left").mean() + np.searchsorted(clean, stamped, "right").mean()
    return Test(norm, float(clean[-above]), float(below / 2 / draws), clean)


def read_noise(file: Path, shape: tuple[int, ...], scale: float = 1.0) -> Iterator[Array]:
    """The noise in an untrusted .npy file, divided by scale, in parts [B, C, H, W] that fit in memory.

    shape: C, H, W. Raises ElijahError that names the file and why: no regular file, too large, broken, pickled, not
    floating, of another shape, not finite, or with a sample whose standard deviation is far from 1.
    """
    array = _open(file)
    if array.dtype.kind != "f" or array.dtype.itemsize not in (2, 4, 8):
        raise ElijahError(f"{file}: holds {str(array.dtype)[:40]}; noise must be float16, float32 or float64")
    wanted = list(shape)
    if array.ndim not in (3, 4) or list(array.shape[-3:]) != wanted:
        found = str(list(array.shape))[:80]
        raise ElijahError(f"{file}: has shape {found}; the trigger's is {wanted}, or [N, ...] for N samples")
    array = array if array.ndim == 4 else array[None]
    if not 1 <= len(array) <= MOST_SAMPLES:
        raise ElijahError(f"{file}: has {len(array)} samples; it must be 1 to {MOST_SAMPLES}")
    step = max(1, AT_ONCE // math.prod(shape))
    for start in range(0, len(array), step):
        part = np.asarray(array[start : start + step], np.float64)
        if not np.isfinite(part).all():
            raise ElijahError(f"{file}: has values that are not finite")
        with np.errstate(all="ignore"):  # what overflows is refused
            part = part / scale
            deviations = part.reshape(len(part), -1).std(1)
        sound = (deviations >= DEVIATIONS[0]) & (deviations <= DEVIATIONS[1])
        if not sound.all():
            k = int(sound.argmin())
            what = f"sample {start + k} has standard deviation {deviations[k]:.3g}, and start noise has 1"
            raise ElijahError(f"{file}: {what}; --scale FLOAT divides the file's values, say by sigma_max")
        yield part


def _open(file: Path) -> NDArray[np.generic]:
    """The array in a .npy file, mapped and not read. Never unpickles."""
    try:
        if not file.is_file():
            raise ElijahError(f"{file}: {'is no regular file' if file.exists() else 'there is no such file'}")
        if file.stat().st_size > LARGEST_FILE:
            raise ElijahError(f"{file}: is larger than {LARGEST_FILE} bytes; screen it in parts")
        with file.open("rb") as opened:
            head = opened.read(12)
        if not head.startswith(b"\x93NUMPY"):
            raise ElijahError(f"{file}: is no .npy file")
        if int.from_bytes(head[8:10] if head[6:7] == b"\x01" else head[8:12], "little") > LARGEST_HEADER:
            raise ElijahError(f"{file}: its header is longer than {LARGEST_HEADER} bytes")
        return np.load(file, mmap_mode="r", allow_pickle=False)
    except OSError as error:
        raise ElijahError(f"{file}: cannot be read ({error.strerror})") from error
    except BROKEN as error:
        raise ElijahError(f"{file}: is broken, or no array of numbers ({str(error)[:100]})") from error


def render(result: Screening) -> str:
    """The screening as text: the answer first, then a line for every sample."""
    count = len(result.samples)
    rows = [
        ("stamped", f"{result.stamped} of {count} samples ({result.share_stamped:.1%})"),
        ("by chance", f"about {number(result.expected_by_chance)} if all of them are clean noise"),
        ("trigger", f"{plain(result.matches)}, norm {number(result.norm)}, gamma {number(result.gamma)}"),
        ("found in", f"{plain(result.model)} ({result.verdict})"),
        ("test", f"{result.method}: stamped above {number(result.threshold)}"),
        ("", f"false positive rate {number(result.false_positive_rate)} for each sample"),
        ("expected", f"AUROC {result.expected_auroc:.4f}, clean noise against noise with the found trigger"),
    ]
    if result.draws is not None:
        rows.append(("draws", f"{number(result.draws)} of clean noise, with a fixed seed"))
    lines = [f"{'STAMPED' if result.stamped else 'NOT STAMPED'}  {plain(result.noise)}", ""]
    lines += [f"  {name:<13}{text}" for name, text in rows]
    lines += ["", f"  {'sample':>7}{'score':>12}{'p-value':>12}  stamped"]
    for k, sample in enumerate(result.samples):
        p_value = "< 1e-300" if sample.p_value < 1e-300 else number(sample.p_value)
        lines.append(f"  {k:>7}{number(sample.score):>12}{p_value:>12}  {'yes' if sample.stamped else 'no'}")
    return "\n".join(lines) + "\n"
