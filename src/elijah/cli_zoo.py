"""The command line for many models: zoo, bench and calibrate. Imports torch only inside a command that needs it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from elijah.console import Talk, emit, run
from elijah.errors import ElijahError
from elijah.files import check_output
from elijah.options import (
    CacheOption,
    DetectorOption,
    DetectorsOption,
    FalsePositivesOption,
    ManifestArgument,
    ManifestsArgument,
    OnlyModelsOption,
    OnlyOption,
    OutputOption,
    QuietOption,
    RepairsOption,
    VerboseOption,
    WorkersOption,
    ZooOutOption,
)

if TYPE_CHECKING:
    from elijah.manifest import Manifest

zoo_app = typer.Typer(no_args_is_help=True, help="Build and judge many models, from a manifest.")
bench_app = typer.Typer(no_args_is_help=True, help="Compare attacks, samplers, detectors and repairs on a zoo.")
IdArgument = Annotated[str, typer.Argument(metavar="ID", help="A base or a model of the manifest.")]
SamplesOption = Annotated[int, typer.Option(min=2, help="Samples for each cell.")]
NoisesOption = Annotated[int, typer.Option("--samples", min=100, help="Clean start noises, and as many stamped ones.")]
ResultsArgument = Annotated[list[Path], typer.Argument(metavar="RESULTS...", help="Folders that elijah zoo run wrote.")]


def _read(manifest: Path, name: str | None = None) -> Manifest:
    """The manifest, which has a model called name."""
    from elijah.manifest import read_manifest

    read = read_manifest(manifest)
    if name is not None and name not in read.needs():
        raise ElijahError(f"{manifest}: has no model {name}")
    return read


def _read_all(manifests: list[Path]) -> list[tuple[Path, Manifest]]:
    return [(manifest, _read(manifest)) for manifest in manifests]


@zoo_app.command("run")
def zoo_run(
    manifest: ManifestArgument,
    out: ZooOutOption,
    cache: CacheOption = Path("cache"),
    workers: WorkersOption = 1,
    detector: DetectorsOption = None,
    repair: RepairsOption = None,
    only: OnlyOption = "",
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Build what has no result yet; a run that was stopped goes on. Exits 2 when a job failed twice."""

    def body(talk: Talk) -> int:
        from elijah.zoo import run_zoo

        read = _read(manifest)
        failed = run_zoo(
            manifest, read, out=out, cache=cache, workers=workers, detectors=detector or [],
            repairs=repair or [], only=only, progress=talk,
        )  # fmt: skip
        if failed:
            raise ElijahError(f"{len(failed)} jobs failed, such as {failed[0]}: see {out / failed[0]}.failed.json")
        talk.say(f"every model asked for has a result in {out}")
        return 0

    run(body, quiet=quiet, verbose=verbose)


@zoo_app.command("job")
def zoo_job(
    manifest: ManifestArgument,
    name: IdArgument,
    out: ZooOutOption,
    cache: CacheOption = Path("cache"),
    detector: DetectorsOption = None,
    repair: RepairsOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Build and judge one model; what `zoo run` starts."""

    def body(talk: Talk) -> int:
        from elijah.zoo import run_job

        read = _read(manifest, name)
        run_job(read, name, cache / read.name, out, detector or [], repair or [])
        return 0

    run(body, quiet=quiet, verbose=verbose)


@zoo_app.command("table")
def zoo_table(
    manifests: ManifestsArgument,
    out: ZooOutOption,
    detector: Annotated[str | None, typer.Option(metavar="NAME", help="Print what its scans found, instead.")] = None,
    output: Annotated[Path | None, typer.Option("-o", "--output", metavar="FILE")] = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Print the results of a zoo as Markdown: success of each attack, and what became of clean samples."""

    def body(talk: Talk) -> int:
        check_output(output)
        from elijah.tables import attack_table, scan_table

        read = [_read(manifest) for manifest in manifests]
        emit(attack_table(read, out) if detector is None else scan_table(read, out, detector), output, talk)
        return 0

    run(body, quiet=quiet, verbose=verbose)


@zoo_app.command("sheet")
def zoo_sheet(
    manifest: ManifestArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.png", help="The picture.")],
    cache: CacheOption = Path("cache"),
    only: OnlyOption = "",
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Draw trigger, target, and samples with and without the trigger, a row a backdoored model."""

    def body(talk: Talk) -> int:
        check_output(output)
        from elijah.tables import models_sheet

        read = _read(manifest)
        models_sheet(read, cache / read.name, output, only, talk)
        talk.say(f"wrote {output}")
        return 0

    run(body, quiet=quiet, verbose=verbose)


@bench_app.command("samplers")
def bench_samplers(
    manifests: ManifestsArgument,
    out: ZooOutOption,
    model: Annotated[
        list[str] | None, typer.Option(metavar="ID", help="A row; repeatable. Without: the first model of each attack.")
    ] = None,
    cache: CacheOption = Path("cache"),
    workers: WorkersOption = 1,
    samples: SamplesOption = 64,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Which attack fires under which sampler: samplers.json, samplers.md and samplers.png in DIR; resumes."""

    def body(talk: Talk) -> int:
        from elijah.bench import firing_matrix

        table = firing_matrix(
            _read_all(manifests), out=out, cache=cache, workers=workers, n=samples, names=model or [], progress=talk,
        )  # fmt: skip
        emit(table, None, talk)
        return 0

    run(body, quiet=quiet, verbose=verbose)


@bench_app.command("row")
def bench_row(
    manifest: ManifestArgument,
    name: IdArgument,
    out: ZooOutOption,
    cache: CacheOption = Path("cache"),
    samples: SamplesOption = 64,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """One row of the matrix; what `bench samplers` starts."""

    def body(talk: Talk) -> int:
        from elijah.bench import run_row

        read = _read(manifest, name)
        run_row(read, name, cache / read.name, out, samples)
        return 0

    run(body, quiet=quiet, verbose=verbose)


@bench_app.command("inversions")
def bench_inversions(
    manifests: ManifestsArgument,
    out: ZooOutOption,
    detector: DetectorOption = "lossfit",
    output: OutputOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Print how near the triggers that a zoo's scans inverted come to the true ones, and whether they fire."""

    def body(talk: Talk) -> int:
        check_output(output)
        from elijah.bench_inversions import inversion_table

        emit(inversion_table([_read(manifest) for manifest in manifests], out, detector), output, talk)
        return 0

    run(body, quiet=quiet, verbose=verbose)


@bench_app.command("forest")
def bench_forest(
    results: ResultsArgument,
    detector: DetectorOption = "lossfit",
    part: Annotated[str, typer.Option(metavar="PART", help="Train on this part.")] = "calibration",
    test: Annotated[str, typer.Option(metavar="PART", help="Test on this part.")] = "test",
    output: OutputOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Print what random forests that know one attack, by a detector's scores, find of all others."""

    def body(talk: Talk) -> int:
        check_output(output)
        from elijah.forest import forest_table

        emit(forest_table(results, detector, part, test), output, talk)
        return 0

    run(body, quiet=quiet, verbose=verbose)


@bench_app.command("screening")
def bench_screening(
    manifests: ManifestsArgument,
    out: ZooOutOption,
    model: OnlyModelsOption = "",
    cache: CacheOption = Path("cache"),
    workers: WorkersOption = 1,
    samples: NoisesOption = 1000,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """How well found triggers tell stamped start noise from clean noise: screening.md in DIR; resumes."""

    def body(talk: Talk) -> int:
        from elijah.bench_screening import bench_screening as bench

        table = bench(
            [(manifest, _read(manifest)) for manifest in manifests], out=out, cache=cache, workers=workers, n=samples,
            only=model, progress=talk,
        )  # fmt: skip
        emit(table, None, talk)
        return 0

    run(body, quiet=quiet, verbose=verbose)


@bench_app.command("stamped")
def bench_stamped(
    manifest: ManifestArgument,
    name: IdArgument,
    out: ZooOutOption,
    cache: CacheOption = Path("cache"),
    samples: NoisesOption = 1000,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """One model's screening; what `bench screening` starts."""

    def body(talk: Talk) -> int:
        from elijah.bench_screening import run_screening

        read = _read(manifest, name)
        run_screening(read, name, cache / read.name, out, samples)
        return 0

    run(body, quiet=quiet, verbose=verbose)


def calibrate(
    results: ResultsArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE", help="The calibration, for elijah scan.")],
    detector: DetectorOption = "lossfit",
    part: Annotated[str, typer.Option(metavar="PART", help="Take the clean models of this part.")] = "calibration",
    test: Annotated[
        str | None, typer.Option(metavar="PART", help="Print how the verdicts on the models of this part come out.")
    ] = None,
    false_positive_rate: FalsePositivesOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Collect the clean models of a zoo that scans compare with; the same detector must have scanned them."""
    if false_positive_rate is not None and test is None:
        raise typer.BadParameter("--false-positive-rate needs --test")

    def body(talk: Talk) -> int:
        check_output(output)
        from elijah.calibrate import calibrate as collect
        from elijah.calibrate import verdict_table
        from elijah.verdict import DEFAULT_RATE

        made, words = collect(results, output, detector, part)
        talk.say(words)
        rate = DEFAULT_RATE if false_positive_rate is None else false_positive_rate
        table = None if test is None else verdict_table(made, results, part, test, rate)
        made.write(output)
        talk.say(f"wrote {output}")
        if table is not None:
            emit(table, None, talk)
        return 0

    run(body, quiet=quiet, verbose=verbose)
