"""The command line that compares scans: elijah bench detectors, stability, effort and figure. No torch at import."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elijah.cli_zoo import IdArgument, ResultsArgument, bench_app
from elijah.console import Talk, emit, run
from elijah.files import check_output
from elijah.options import (
    CacheOption,
    DetectorOption,
    DetectorsOption,
    ManifestArgument,
    ManifestsArgument,
    OnlyModelsOption,
    QuietOption,
    VerboseOption,
    WorkersOption,
    ZooOutOption,
)

if TYPE_CHECKING:
    from elijah.bench_detectors import Run


def _compare(what: str, runs: list[Run], manifests: list[Path], talk: Talk, **how: Any) -> int:
    """Performs the runs of a bench and prints its table."""
    from elijah.bench_detectors import bench
    from elijah.bench_tables import TABLES
    from elijah.manifest import read_manifest

    read = [(manifest, read_manifest(manifest)) for manifest in manifests]
    emit(bench(what, runs, TABLES[what], read, progress=talk, **how), None, talk)
    return 0


@bench_app.command("detectors")
def bench_detectors(
    manifests: ManifestsArgument,
    out: ZooOutOption,
    model: OnlyModelsOption = "",
    detector: DetectorsOption = None,
    cache: CacheOption = Path("cache"),
    workers: WorkersOption = 1,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Detectors on the same models, timed: DIR/detectors.md and a JSON file a model; resumes. lossfit and elijah."""

    def body(talk: Talk) -> int:
        from elijah.bench_detectors import detector_runs

        runs = detector_runs(detector or ["lossfit", "elijah"])
        return _compare("detectors", runs, manifests, talk, out=out, cache=cache, workers=workers, only=model)

    run(body, quiet=quiet, verbose=verbose)


@bench_app.command("stability")
def bench_stability(
    manifests: ManifestsArgument,
    out: ZooOutOption,
    model: OnlyModelsOption = "",
    seeds: Annotated[int, typer.Option(min=1, help="Seeds for each model.")] = 10,
    cache: CacheOption = Path("cache"),
    workers: WorkersOption = 1,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Which verdicts of lossfit change with the seed, batch size, threads and precision: DIR/stability.md; resumes."""

    def body(talk: Talk) -> int:
        from elijah.bench_detectors import stability_runs

        runs = stability_runs(seeds)
        return _compare("stability", runs, manifests, talk, out=out, cache=cache, workers=workers, only=model)

    run(body, quiet=quiet, verbose=verbose)


@bench_app.command("effort")
def bench_effort(
    manifests: ManifestsArgument,
    out: ZooOutOption,
    model: OnlyModelsOption = "",
    cache: CacheOption = Path("cache"),
    workers: WorkersOption = 1,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """What lossfit finds with a shorter and a longer search, against what it costs: DIR/effort.md; resumes."""

    def body(talk: Talk) -> int:
        from elijah.bench_detectors import effort_runs

        runs = effort_runs()
        return _compare("effort", runs, manifests, talk, out=out, cache=cache, workers=workers, only=model)

    run(body, quiet=quiet, verbose=verbose)


@bench_app.command("scans")
def bench_scans(
    manifest: ManifestArgument,
    name: IdArgument,
    runs: Annotated[str, typer.Argument(metavar="RUNS", help="A JSON list of scans, as the result repeats them.")],
    out: ZooOutOption,
    cache: CacheOption = Path("cache"),
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Scans of one model; what `bench detectors`, `stability` and `effort` start."""

    def body(talk: Talk) -> int:
        from elijah.bench_detectors import read_runs, run_model
        from elijah.manifest import read_manifest

        read = read_manifest(manifest)
        run_model(read, name, cache / read.name, out, read_runs(runs))
        return 0

    run(body, quiet=quiet, verbose=verbose)


@bench_app.command("figure")
def bench_figure(
    results: ResultsArgument,
    output: Annotated[Path, typer.Option("-o", "--output", metavar="FILE.svg", help="The figure.")],
    detector: DetectorOption = "lossfit",
    part: Annotated[str | None, typer.Option(metavar="PART", help="Only models of this part.")] = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Draw how suspicious a zoo's scans find each model, clean ones beside those of each attack."""

    def body(talk: Talk) -> int:
        check_output(output)
        from elijah.figure import suspicion_figure

        emit(suspicion_figure(results, detector, part), output, talk)
        return 0

    run(body, quiet=quiet, verbose=verbose)
