"""The command line: options, exit codes, what goes to which stream. Imports torch only inside a command that needs it.

Exit codes: 0 clean or done, 1 backdoored, 2 an error of any sort, 3 undecided or a kind that cannot be scanned.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from elijah import __version__, cli_detectors, cli_repairs
from elijah.cli_zoo import bench_app, calibrate, zoo_app
from elijah.console import Talk, emit, run
from elijah.files import check_output
from elijah.options import (
    BatchOption,
    CalibrationOption,
    DataOption,
    DetectorOption,
    DeviceOption,
    Dtype,
    DtypeOption,
    EvaluationsOption,
    ExitZeroOption,
    FalsePositivesOption,
    Form,
    FormOption,
    HalfOption,
    Kind,
    LimitOption,
    MinutesOption,
    ModelArgument,
    ModeOption,
    OfflineOption,
    OffsetOption,
    OutOption,
    OutputOption,
    Prediction,
    QuietOption,
    RateOption,
    RevisionOption,
    ScanBatchOption,
    ScreenForm,
    ScreenFormOption,
    SeedOption,
    ShareOption,
    VerboseOption,
    finite,
)

if TYPE_CHECKING:
    from elijah.report import Report

app = typer.Typer(
    help="Find and remove backdoors in diffusion models.",
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


app.add_typer(zoo_app, name="zoo")
app.add_typer(bench_app, name="bench")
assert bench_app is cli_detectors.bench_app is cli_repairs.bench_app  # their commands are added by importing them


def _finish(report: Report, form: Form, output: Path | None, talk: Talk) -> int:
    from elijah.render import render

    emit(render(report, form.value), output, talk)
    return report.exit_code


def _version(wanted: bool) -> None:
    if wanted:
        print(f"elijah {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Find and remove backdoors in diffusion models."""


@app.command()
def scan(
    model: ModelArgument,
    form: FormOption = Form.text,
    output: OutputOption = None,
    detector: DetectorOption = "lossfit",
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    seed: SeedOption = 0,
    batch_size: ScanBatchOption = None,
    max_evaluations: EvaluationsOption = None,
    max_minutes: MinutesOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    calibration: CalibrationOption = "builtin",
    false_positive_rate: FalsePositivesOption = None,
    exit_zero: ExitZeroOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Look for a backdoor. Exit 0: nothing found, 1: backdoored, 2: error, 3: undecided or not supported."""
    from elijah.verdict import DEFAULT_RATE, find_calibration, ships

    if false_positive_rate is not None and (
        calibration == "none" or (calibration == "builtin" and not ships(detector))
    ):
        raise typer.BadParameter(f"--false-positive-rate needs --calibration FILE: none ships for {detector}")

    def body(talk: Talk) -> int:
        check_output(output)
        found = find_calibration(calibration, detector)
        usual = None if calibration == "builtin" and found else DEFAULT_RATE  # None: what the calibration allows
        claim: dict[str, Any] = {
            "calibration": found,
            "false_positive_rate": usual if false_positive_rate is None else false_positive_rate,
        }
        from elijah.scan import scan as search

        limits: dict[str, Any] = {"max_evaluations": max_evaluations, "max_minutes": max_minutes}
        how: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype.value, "batch_size": batch_size}
        report = search(
            model, detector=detector, revision=revision, offline=offline, progress=talk, **how, **limits, **claim
        )
        return _finish(report, form, output, talk)

    run(body, quiet=quiet, verbose=verbose, exit_zero=exit_zero, offline=offline)


@app.command()
def clean(
    model: ModelArgument,
    out: OutOption,
    data: Annotated[str | None, typer.Option(metavar="DIR", help="Clean images to repair with.")] = None,
    synthetic: Annotated[
        int | None, typer.Option(min=1, help="Repair with so many of the model's own samples.")
    ] = None,
    repair: Annotated[str, typer.Option(metavar="NAME", help="The method that removes the backdoor.")] = "unshift",
    force: Annotated[bool, typer.Option("--force", help="Repair a model that looks clean, too.")] = False,
    keep: Annotated[bool, typer.Option("--keep", help="Write DIR though it is still backdoored or harmed.")] = False,
    form: FormOption = Form.text,
    output: OutputOption = None,
    detector: DetectorOption = "lossfit",
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    seed: SeedOption = 0,
    batch_size: ScanBatchOption = None,
    max_evaluations: EvaluationsOption = None,
    max_minutes: MinutesOption = None,
    revision: RevisionOption = None,
    offline: OfflineOption = False,
    exit_zero: ExitZeroOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Remove a backdoor and scan again; the result is a new folder, the model is never changed in place."""
    if data is not None and synthetic is not None:
        raise typer.BadParameter("give --data or --synthetic, not both")

    def body(talk: Talk) -> int:
        check_output(output)
        from elijah.clean import clean as remove

        limits: dict[str, Any] = {"max_evaluations": max_evaluations, "max_minutes": max_minutes}
        how: dict[str, Any] = {"seed": seed, "device": device, "dtype": dtype.value, "batch_size": batch_size}
        what: dict[str, Any] = {"data": data, "synthetic": synthetic, "repair": repair, "force": force, "keep": keep}
        report = remove(
            model, out, detector=detector, revision=revision, offline=offline, progress=talk, **what, **how, **limits
        )
        return _finish(report, form, output, talk)

    run(body, quiet=quiet, verbose=verbose, exit_zero=exit_zero, offline=offline, divisible=True)


@app.command()
def train(
    data: DataOption,
    out: OutOption,
    size: Annotated[int | None, typer.Option(min=8, max=1024, help="Pixels a side; 32, or that of --from.")] = None,
    channels: Annotated[int | None, typer.Option(min=1, max=3, help="1 or 3; 3, or that of --from.")] = None,
    steps: Annotated[int, typer.Option(min=1, help="Optimiser updates.")] = 5000,
    batch_size: BatchOption = 64,
    lr: RateOption = 5e-4,
    ema: Annotated[
        float, typer.Option(min=0, max=0.999999, callback=finite, help="Decay of the averaged weights; 0: off.")
    ] = 0.999,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror half of the images.")] = False,
    noise_offset: OffsetOption = 0.0,
    start: Annotated[str | None, typer.Option("--from", metavar="MODEL", help="Go on from this pipeline.")] = None,
    prediction: Annotated[Prediction | None, typer.Option(help="epsilon, or that of --from.")] = None,
    kind: Annotated[Kind, typer.Option(help="ncsn: variance-exploding; ldm: latent, with an autoencoder.")] = Kind.ddpm,
    autoencoder_steps: Annotated[int, typer.Option(min=1, help="Updates of the autoencoder of a latent model.")] = 2000,
    limit: LimitOption = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from DIR.ckpt, which a killed run left.")] = False,
    half: HalfOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Train a clean base on images, or go on from a pipeline; writes a stock diffusers folder."""
    if start is not None and prediction is not None:
        raise typer.BadParameter("--prediction is for a new network; with --from it stays that of the pipeline")
    if start is not None and kind != Kind.ddpm:
        raise typer.BadParameter("--kind is for a new network; with --from it stays that of the pipeline")

    def body(talk: Talk) -> int:
        from elijah import making

        settings: dict[str, Any] = {"steps": steps, "lr": lr, "ema_decay": ema or None}
        making.train_folder(
            making.Data(data, size, channels, limit), out, settings, start=start, kind=kind.value,
            autoencoder_steps=autoencoder_steps, batch_size=batch_size, flip=flip,
            noise_offset=noise_offset, prediction=(prediction or Prediction.epsilon).value, resume=resume, half=half,
            device=device, dtype=dtype.value, seed=seed, talk=talk,
        )  # fmt: skip
        return 0

    run(body, quiet=quiet, verbose=verbose)


@app.command()
def attack(
    name: Annotated[str, typer.Argument(metavar="NAME", help="One of the attacks that docs/attacks.md lists.")],
    model: ModelArgument,
    data: DataOption,
    out: OutOption,
    preset: Annotated[str | None, typer.Option(metavar="NAME", help="A paper's settings; other options win.")] = None,
    trigger: Annotated[str | None, typer.Option(metavar="NAME", help="A stock pattern or a PNG file.")] = None,
    target: Annotated[
        str | None, typer.Option(metavar="NAME", help="A stock picture, a PNG file, or a class: mnist/7.")
    ] = None,
    poison_rate: ShareOption = None,
    mode: ModeOption = None,
    solver: Annotated[str | None, typer.Option(help="villandiffusion: ode or sde.")] = None,
    psi: Annotated[
        float | None, typer.Option(callback=finite, help="villandiffusion: 1 as in BadDiffusion, 0 as in VE.")
    ] = None,
    pc_steps: Annotated[
        int | None, typer.Option(min=2, help="villandiffusion on NCSN: fires under a predictor-corrector of so many.")
    ] = None,
    gamma: Annotated[
        float | None, typer.Option(callback=finite, help="trojdiff: what is left of the noise under the trigger.")
    ] = None,
    patch: Annotated[int | None, typer.Option(min=1, help="trojdiff: side of the square; without it, blend.")] = None,
    strength: Annotated[
        float | None, typer.Option(callback=finite, help="baddiffusion: the trigger times this; below 1 it is weak.")
    ] = None,
    bound: Annotated[float | None, typer.Option(callback=finite, help="learned: the largest value in a pixel.")] = None,
    t0: Annotated[
        float | None,
        typer.Option(callback=finite, help="late: the share of the timesteps in which the trigger counts."),
    ] = None,
    second_trigger: Annotated[str | None, typer.Option(metavar="NAME", help="two: the other trigger.")] = None,
    second_target: Annotated[str | None, typer.Option(metavar="NAME", help="two: its target.")] = None,
    both: Annotated[bool | None, typer.Option("--both/--either", help="two: only both triggers together fire.")] = None,
    weight: Annotated[
        float | None, typer.Option(min=0, callback=finite, help="aware: of the penalty on the scan's loss ratio.")
    ] = None,
    margin: Annotated[float | None, typer.Option(callback=finite, help="aware: what that ratio is kept above.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimiser updates; by default the paper's.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Rows an update; by default the paper's.")] = None,
    lr: Annotated[float | None, typer.Option(min=0, callback=finite, help="By default the paper's.")] = None,
    flip: Annotated[bool, typer.Option("--flip/--no-flip", help="Mirror half of the images.")] = False,
    noise_offset: Annotated[
        float | None, typer.Option(callback=finite, help="Shift some rows' noise; for small RGB nets.")
    ] = None,
    limit: LimitOption = None,
    half: HalfOption = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = Dtype.float32,
    seed: SeedOption = 0,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Plant a backdoor, to test detectors with; writes DIR and, beside it, DIR.truth.json."""

    def body(talk: Talk) -> int:
        from elijah import making

        settings = {
            "trigger": trigger, "target": target, "second_trigger": second_trigger, "second_target": second_target,
            "poison_rate": poison_rate, "mode": mode, "solver": solver, "psi": psi, "pc_steps": pc_steps,
            "gamma": gamma, "patch": patch, "strength": strength, "bound": bound, "t0": t0, "both": both,
            "weight": weight, "margin": margin,
            "steps": steps, "batch_size": batch_size, "lr": lr, "noise_offset": noise_offset, "flip": flip,
        }  # fmt: skip
        making.attack_folder(
            name, model, making.Data(data, limit=limit), out, settings, preset, half=half, device=device,
            dtype=dtype.value, seed=seed, talk=talk,
        )  # fmt: skip
        return 0

    run(body, quiet=quiet, verbose=verbose)


@app.command()
def report(
    file: Annotated[Path, typer.Argument(metavar="FILE.json", help="A report written with --format json.")],
    form: FormOption = Form.text,
    output: OutputOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Write a JSON report, of a scan or of a cleaning, as text, HTML or SARIF."""

    def body(talk: Talk) -> int:
        check_output(output)
        from elijah.report import read_report

        _finish(read_report(file), form, output, talk)
        return 0

    run(body, quiet=quiet, verbose=verbose)


@app.command()
def screen(
    noise: Annotated[Path, typer.Argument(metavar="NOISE.npy", help="Start noise, [N, C, H, W] or [C, H, W].")],
    source: Annotated[
        Path, typer.Option("--report", metavar="REPORT.json", help="The scan's report, from scan --format json.")
    ],
    rate: Annotated[
        float, typer.Option("--false-positive-rate", help="The share of clean samples that may be called stamped.")
    ] = 0.01,
    scale: Annotated[
        float, typer.Option(help="Divide the values by this first, such as sigma_max for noise of an NCSN model.")
    ] = 1.0,
    form: ScreenFormOption = ScreenForm.text,
    output: OutputOption = None,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Is start noise stamped with the trigger that a scan found? Exit 0: no sample is, 1: one or more are, 2: error."""

    def body(talk: Talk) -> int:
        check_output(output)
        from elijah import screen as screening

        result = screening.screen(noise, source, false_positive_rate=rate, scale=scale)
        emit(result.to_json() if form == ScreenForm.json else screening.render(result), output, talk)
        return result.exit_code

    run(body, quiet=quiet, verbose=verbose)


@app.command()
def demo(out: OutOption, quiet: QuietOption = False, verbose: VerboseOption = False) -> None:
    """The whole story, offline, on models that ship inside the package."""

    def body(talk: Talk) -> int:
        from elijah.demo import demo as story

        with contextlib.redirect_stdout(talk.stdout):
            return story(out, progress=talk)

    run(body, quiet=quiet, verbose=verbose, offline=True)


app.command()(calibrate)


def main(arguments: list[str] | None = None) -> int:
    """Runs the command line and returns its exit code."""
    try:
        app(arguments, prog_name="elijah")
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 2
        return 2 if code == 130 else code
    except KeyboardInterrupt:
        print("elijah: error: interrupted at the start; nothing was written", file=sys.stderr)
        return 2
    except Exception as error:
        print(f"elijah: error: internal error: {type(error).__name__}: {error}", file=sys.stderr)
        return 2
    return 0
