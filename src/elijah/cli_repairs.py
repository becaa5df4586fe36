"""The command line for the comparison of repairs: elijah bench repairs. Imports torch only inside a command."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from elijah.cli_zoo import IdArgument, SamplesOption, bench_app
from elijah.console import Talk, emit, run
from elijah.errors import ElijahError
from elijah.options import (
    CacheOption,
    ManifestArgument,
    ManifestsArgument,
    OnlyModelsOption,
    QuietOption,
    VerboseOption,
    WorkersOption,
    ZooOutOption,
)

ChosenOption = Annotated[
    list[str] | None, typer.Option("--repair", metavar="NAME", help="Repair with it; repeatable. Without: all.")
]
DataOption = Annotated[
    list[str] | None, typer.Option("--data", metavar="KIND", help="synthetic or real; repeatable. Without: both.")
]
RescanOption = Annotated[
    bool, typer.Option("--rescan", help="Rescan after unshift, distill and erase, and repair what is found then.")
]
HarmOption = Annotated[bool, typer.Option("--harm", help="Repair a trigger that is none, too, and measure the drift.")]
StrengthOption = Annotated[bool, typer.Option("--strength", help="Attack again, and measure how fast it succeeds.")]
FidOption = Annotated[
    int, typer.Option("--fid", min=0, help="Samples of each FID. 0: what the manifest says, which may be none.")
]


@bench_app.command("repairs")
def bench_repairs(
    manifests: ManifestsArgument,
    out: ZooOutOption,
    model: OnlyModelsOption = "",
    repair: ChosenOption = None,
    data: DataOption = None,
    cache: CacheOption = Path("cache"),
    workers: WorkersOption = 1,
    samples: SamplesOption = 64,
    fid: FidOption = 0,
    rescan: RescanOption = False,
    harm: HarmOption = False,
    strength: StrengthOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """What is left of the attacks after each repair: a JSON file a model and repairs.md in DIR; resumes."""

    def body(talk: Talk) -> int:
        from elijah.bench_repairs import repair_bench
        from elijah.manifest import read_manifest

        emit(
            repair_bench(
                [(path, read_manifest(path)) for path in manifests], out=out, cache=cache, workers=workers, n=samples,
                repairs=chosen_repairs(repair), data=chosen_data(data), only=model, fid=fid,
                flags={"rescan": rescan, "harm": harm, "strength": strength}, progress=talk,
            ), None, talk,
        )  # fmt: skip
        return 0

    run(body, quiet=quiet, verbose=verbose)


@bench_app.command("repairs-row")
def repairs_row(
    manifest: ManifestArgument,
    name: IdArgument,
    out: ZooOutOption,
    cache: CacheOption = Path("cache"),
    repair: ChosenOption = None,
    data: DataOption = None,
    samples: SamplesOption = 64,
    fid: FidOption = 0,
    rescan: RescanOption = False,
    harm: HarmOption = False,
    strength: StrengthOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """One model of the comparison; what `bench repairs` starts."""

    def body(talk: Talk) -> int:
        from elijah.bench_repairs import run_model
        from elijah.manifest import read_manifest

        read = read_manifest(manifest)
        if name not in {entry.id for entry in read.entries()}:
            raise ElijahError(f"{manifest}: has no model {name}")
        flags = {"rescan": rescan, "harm": harm, "strength": strength}
        run_model(read, name, cache / read.name, out, samples, chosen_repairs(repair), chosen_data(data), fid, flags)
        return 0

    run(body, quiet=quiet, verbose=verbose)


def chosen_repairs(names: list[str] | None) -> list[str]:
    from elijah.repairs import REPAIRS

    return chosen(names, list(REPAIRS), "repair")


def chosen_data(names: list[str] | None) -> list[str]:
    from elijah.judging_repairs import DATA

    return chosen(names, list(DATA), "data")


def chosen(names: list[str] | None, known: list[str], what: str) -> list[str]:
    """The names asked for; without any, all that are known. Raises ElijahError for an unknown one."""
    if unknown := [name for name in names or () if name not in known]:
        raise ElijahError(f"unknown {what} {unknown[0]!r}: use one of {', '.join(known)}")
    return names or known
