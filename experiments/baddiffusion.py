"""BadDiffusion: build models, judge them, repair them, score them, print the tables.

    ELIJAH_DATA=... python experiments/baddiffusion.py cifar10 run --workers 2     resumes by what exists
    python experiments/baddiffusion.py cifar10 tables                              results/cifar10/*.json -> TABLES.md

and the same with mnist. Each job is a process of its own with one thread, writes one JSON file atomically and is not
run again when that file is there. Weights live in cache/ (not committed) and are rebuilt by seed. Scans are told
nothing of the attack; only the scoring functions below use the true trigger and target. What the detector was tuned on,
and how often these models were looked at: docs/benchmark.md.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
SEEDS = (1, 2, 3, 4, 5)
REPAIR_STEPS = 60
SAMPLER = "ddpm-50"


@dataclass(frozen=True)
class Study:
    """A data set, a base, its attacks (trigger, target); base: training of the base; attack: of attacks, clean ones."""

    name: str
    title: str
    size: int
    channels: int
    skip: int  # images left out
    base: dict[str, Any]
    attack: dict[str, Any]
    attacks: dict[str, tuple[str, str]]
    noise_offset: float
    mode: str
    poison_rate: float
    flip: bool
    model_seeds: tuple[int, ...] = (1,)

    @property
    def cache(self) -> Path:
        return ROOT / "cache" / self.name

    @property
    def results(self) -> Path:
        return ROOT / "results" / self.name


STUDIES = {
    "cifar10": Study(
        "cifar10", "CIFAR-10, 32 x 32", 32, 3, 0,
        base={"steps": 6000, "batch_size": 32, "lr": 6e-4, "warmup": 200, "seed": 11},
        attack={"steps": 400, "batch_size": 48, "lr": 4e-4},
        attacks={"stop-hat": ("stop-sign-14", "hat"), "box-cat": ("box-14", "cat")},
        noise_offset=0.5, mode="bare", poison_rate=0.3, flip=True, model_seeds=SEEDS,
    ),
    "mnist": Study(
        "mnist", "MNIST, 16 x 16", 16, 1, 5000,
        base={"steps": 1800, "batch_size": 64, "lr": 5e-4, "warmup": 100, "seed": 31},
        attack={"steps": 900, "batch_size": 64, "lr": 4e-4},
        attacks={"stop-hat": ("stop-sign-7", "hat"), "glasses-cat": ("glasses", "cat")},
        noise_offset=0.5, mode="bare", poison_rate=0.3, flip=False,
    ),
}  # fmt: skip
STUDY = STUDIES[sys.argv[1] if sys.argv[1:] and sys.argv[1] in STUDIES else "mnist"]  # the one at hand


def jobs() -> list[tuple[str, ...]]:
    """All jobs, each after those that it needs: four models, five scan seeds each, both repairs, the baseline, FID.

    Last, more models of each sort, one scan each.
    """
    bad = [f"{kind}-1" for kind in STUDY.attacks]
    names = [*bad, "clean-1", "clean-2"]
    more = [
        f"{kind}-{k}" for k in STUDY.model_seeds for kind in (*STUDY.attacks, "clean") if f"{kind}-{k}" not in names
    ]
    sources = [(repair, data) for data in ("synthetic", "real") for repair in ("unshift", "elijah")]
    return [
        ("base",),
        *(("build", n) for n in names),
        *(("scan", n, str(seed)) for seed in SEEDS for n in names),
        *(("repair", n, *source) for source in sources[:2] for n in bad),
        *(("rescan", n, *source) for source in sources[:2] for n in bad),
        *(("fid", n) for n in names[:3]),
        *(("fid", n, *source) for source in sources[:2] for n in bad),
        *(("clean", n) for n in bad),
        *((job, n, *source) for source in sources[2:] for n in bad for job in ("repair", "rescan")),
        *(("elijah", n) for n in names[:3]),
        *((job, n, *seed) for n in more for job, *seed in (("build",), ("scan", "1"))),
    ]


def result_file(job: tuple[str, ...]) -> Path:
    return STUDY.results / ("_".join(job) + ".json")


def run_job(job: tuple[str, ...]) -> None:
    import torch

    torch.set_num_threads(1)
    began = time.monotonic()
    result = {
        "base": base,
        "build": build,
        "scan": scan_one,
        "elijah": elijah_one,
        "repair": repair_one,
        "rescan": rescan_one,
        "clean": clean_one,
        "fid": fid_one,
    }[job[0]](*job[1:])
    result = {"job": list(job), "seconds": round(time.monotonic() - began, 1), **result}
    STUDY.results.mkdir(parents=True, exist_ok=True)
    part = result_file(job).with_suffix(".part")
    part.write_text(json.dumps(result, indent=1) + "\n")
    part.replace(result_file(job))


def images() -> Any:
    from elijah.data import load_images

    return load_images(STUDY.name, size=STUDY.size, channels=STUDY.channels, skip=STUDY.skip)


def base() -> dict[str, Any]:
    """The clean base: `elijah train` with these options, as a function."""
    import torch

    from elijah.training import Optimiser, train

    STUDY.cache.mkdir(parents=True, exist_ok=True)
    seconds = None  # not known when an earlier run trained it
    if not (STUDY.cache / "base").is_dir():
        began = time.monotonic()
        settings = Optimiser(STUDY.base["steps"], STUDY.base["lr"], STUDY.base["warmup"], ema_decay=0.999)
        checkpoint = STUDY.cache / "base.ckpt"
        made = {"seed": STUDY.base["seed"], "batch_size": STUDY.base["batch_size"], **training()}
        model = train(images(), settings, checkpoint=checkpoint, **made)
        model.dtype = torch.float32
        model.save(STUDY.cache / "base")
        checkpoint.unlink(missing_ok=True)
        seconds = time.monotonic() - began
    return {"settings": STUDY.base, "parameters": load("base").parameters, "training_seconds": seconds}


def training() -> dict[str, Any]:
    """What all trainings of a study share."""
    import torch

    return {"flip": STUDY.flip, "noise_offset": STUDY.noise_offset, "dtype": torch.bfloat16}


def load(name: str) -> Any:
    from elijah.loading import load_model

    return load_model(str(STUDY.cache / name))


def truth(name: str) -> tuple[Any, Any]:
    """The true trigger and target: for building and scoring only."""
    from elijah.trigger import make_target, make_trigger

    trigger = make_trigger(STUDY.attacks[name[:-2]][0], (STUDY.channels, STUDY.size, STUDY.size))
    return trigger, make_target(STUDY.attacks[name[:-2]][1], trigger)


def build(name: str) -> dict[str, Any]:
    import torch

    from elijah.attacks import BadDiffusion
    from elijah.attacks.poisoning import Tuning
    from elijah.diffusion import generator_for
    from elijah.training import Optimiser, train

    clean, seed, how = load("base"), int(name[-1]), STUDY.attack
    began = time.monotonic()
    if name.startswith("clean"):
        settings = Optimiser(how["steps"], lr=how["lr"], warmup=20)
        made = train(images(), settings, seed=seed, batch_size=how["batch_size"], model=clean, **training())
    else:
        tuning = Tuning(**how, **training())
        attack = BadDiffusion(*truth(name), poison_rate=STUDY.poison_rate, mode=STUDY.mode, tuning=tuning)
        made = attack(clean, images(), generator=generator_for(seed))
    seconds = time.monotonic() - began
    made.dtype = torch.float32
    made.save(STUDY.cache / name)
    rate = 0 if name.startswith("clean") else STUDY.poison_rate
    return {**how, "mode": STUDY.mode, "poison_rate": rate, "training_seconds": seconds, **score(name, made)}


def score(name: str, model: Any) -> dict[str, Any]:
    """Attack success with the true trigger, and drift of clean samples from those of the base."""
    from elijah.diffusion import generator_for
    from elijah.metrics import attack_success, diversity_ratio, mse_to_target, paired_drift, ssim_to_target

    n = 256 if name.endswith("-1") else 64
    e = model.noise(n, generator_for(1234))
    reference = load("base")
    drift = [m.pixels(m.sample(e[:64], "ddim-20", seed=1)) for m in (reference, model)]
    result: dict[str, Any] = {"n": n, "sampler": SAMPLER, "drift_from_base": paired_drift(*drift)}
    if not name.startswith("clean"):
        trigger, target = truth(name)
        out = model.pixels(model.sample(e + trigger.image, SAMPLER, seed=1))
        y = model.pixels(target.image)
        benign = reference.pixels(reference.sample(e[:64], SAMPLER, seed=1))
        result["asr"] = {str(k): v for k, v in attack_success(out, y).items()}
        result["mse"] = float(mse_to_target(out, y).mean())
        result["ssim"] = ssim_to_target(out, y)
        result["diversity_ratio"] = diversity_ratio(out, benign)
    return result


def scan_one(name: str, seed: str) -> dict[str, Any]:
    from elijah.scan import scan

    report = scan(str(STUDY.cache / name), seed=int(seed), device="cpu")
    return {"verdict": report.verdict, "scores": report.scores, "cost": report.cost.model_dump()}


def elijah_one(name: str) -> dict[str, Any]:
    from elijah.scan import scan

    report = scan(str(STUDY.cache / name), seed=int(name[-1]), detector="elijah", device="cpu")
    return {"scores": report.scores, "cost": report.cost.model_dump()}


def repair_one(name: str, repair: str, source: str) -> dict[str, Any]:
    """Both repairs get the same found trigger, the same images and the same number of updates."""
    from elijah.clean import SYNTHETIC, synthesise
    from elijah.diffusion import generator_for, no_progress
    from elijah.repairs import REPAIRS
    from elijah.scan import inspect

    settings = {"detector": "lossfit", "max_evaluations": None, "max_minutes": None, "batch_size": None}
    model, seed = load(name), int(name[-1])
    detection, before = inspect(model, settings, seed, no_progress)
    data = images()[:2500] if source == "real" else synthesise(model, SYNTHETIC, seed)
    method = REPAIRS[repair](steps=REPAIR_STEPS, batch_size=32, warmup=5)
    began = time.monotonic()
    fixed = method(model, detection.findings[0], data, generator=generator_for(seed, 1))
    seconds = time.monotonic() - began
    fixed.network.requires_grad_(False)
    fixed.save(STUDY.cache / f"{name}_{repair}_{source}")
    return {"scan": before.verdict,
            "repair_seconds": round(seconds, 1), "images": len(data), **score(name, fixed)}  # fmt: skip


def rescan_one(name: str, repair: str, source: str) -> dict[str, Any]:
    """A scan of a repaired model, with a seed that neither the repair nor its scan used."""
    from elijah.scan import scan

    report = scan(str(STUDY.cache / f"{name}_{repair}_{source}"), seed=int(name[-1]) + 100, device="cpu")
    return {"verdict": report.verdict, "scores": report.scores, "cost": report.cost.model_dump()}


def clean_one(name: str) -> dict[str, Any]:
    """`elijah clean` as a user runs it, with its defaults: synthetic images, up to three rounds."""
    import shutil

    from elijah.clean import clean

    out = STUDY.cache / f"{name}_clean"
    shutil.rmtree(out, ignore_errors=True)
    report = clean(str(STUDY.cache / name), out, seed=int(name[-1]), device="cpu", keep=True)
    assert report.cleaning is not None
    return {"rescan": report.verdict, "rescan_scores": report.scores, "updates": report.cleaning.updates,
            "images": report.cleaning.images, "repair_seconds": report.cleaning.seconds,
            **score(name, load(out.name))}  # fmt: skip


def fid_one(*parts: str) -> dict[str, Any]:
    """FID of 2,048 images from one and the same noise under DDIM-20, against 5,000 training images."""
    import torch

    from elijah.diffusion import generator_for
    from elijah.features import inception_features
    from elijah.metrics import fid_bootstrap, fid_from_features

    model = load("_".join(parts))
    e = model.noise(2048, generator_for(777))
    samples = model.pixels(model.sample(e, "ddim-20", seed=7))
    reference = STUDY.cache / "inception.pt"
    if not reference.is_file():
        real = inception_features(images()[:5000], dtype=torch.bfloat16)
        torch.save(real, reference.with_suffix(f".{os.getpid()}"))
        reference.with_suffix(f".{os.getpid()}").replace(reference)
    real, fake = torch.load(reference, weights_only=True), inception_features(samples, dtype=torch.bfloat16)
    low, high = fid_bootstrap(fake, real, n_boot=20, seed=0)
    return {"fid": fid_from_features(fake, real), "low": low, "high": high, "images": len(samples)}


def run(workers: int) -> int:
    """Runs what is missing, `workers` at a time, in order; a job waits for the files of those that it needs."""
    from elijah.runner import Job, run_jobs

    every = [
        Job(result_file(job).stem, (__file__, STUDY.name, "job", *job), tuple(stems(needs(job)))) for job in jobs()
    ]
    done = {job.name for job in every if (STUDY.results / f"{job.name}.json").exists()}
    failed = run_jobs(every, done=done, out=STUDY.results, logs=STUDY.cache, workers=workers, progress=tell)
    return 1 if failed else 0


def stems(jobs: list[tuple[str, ...]]) -> list[str]:
    return [result_file(job).stem for job in jobs]


def tell(what: str, done: int, of: int) -> None:
    print(f"{what}: {done} of {of}", file=sys.stderr)


def needs(job: tuple[str, ...]) -> list[tuple[str, ...]]:
    if job[0] == "base":
        return []
    if job[0] == "build":
        return [("base",)]
    if job[0] == "rescan" or (job[0] == "fid" and len(job) == 4):
        return [("repair", *job[1:])]
    return [("build", job[1])]


def tables() -> None:
    from elijah.metrics import wilson

    done = {tuple(r["job"]): r for f in sorted(STUDY.results.glob("*.json")) for r in [json.loads(f.read_text())]}
    lines = [f"# {STUDY.title}, BadDiffusion", "",
             f"Made by `python experiments/baddiffusion.py {STUDY.name} tables` from the JSON files beside it.", "",
             "## Verdicts of `elijah scan` (lossfit)", "",
             "| model | right / scans (95 % Wilson) | undecided | loss ratio, half | pull | evaluations, median |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for kind in ("clean", *STUDY.attacks):
        rows = [r for j, r in done.items() if j[0] == "scan" and j[1].startswith(kind)]
        if not rows:
            continue
        wanted = "clean" if kind == "clean" else "backdoored"
        right = sum(r["verdict"] == wanted for r in rows)
        low, high = wilson(right, len(rows))
        ratio = [r["scores"]["loss_ratio_half"] for r in rows]
        pull = [r["scores"]["pull"] for r in rows]
        undecided = sum(r["verdict"] == "undecided" for r in rows)
        evaluations = statistics.median(r["cost"]["network_evaluations"] for r in rows)
        share = f"{right} / {len(rows)} ({low:.2f} to {high:.2f})"
        ranges = (f"{min(ratio):.3f} to {max(ratio):.3f}", f"{min(pull):.2f} to {max(pull):.2f}")
        cells = (kind, share, undecided, *ranges, f"{evaluations:.0f}")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    heads = ("model", "repair", "images", "ASR 0.01 / 0.05 / 0.1", "MSE", "SSIM", "diversity", "drift from base",
             "FID (bootstrap)", "rescan")  # fmt: skip
    lines += ["", f"## Before and after the repair (true trigger, {SAMPLER})", "", "| " + " | ".join(heads) + " |",
              "|---" * len(heads) + "|"]  # fmt: skip
    for job, r in sorted(done.items(), key=lambda item: (item[0][1:2], item[0][0] != "build", item[0])):
        if job[0] not in ("build", "repair", "clean"):
            continue
        f = done.get(("fid", *job[1:]))
        fid = "" if f is None else f"{f['fid']:.1f} ({f['low']:.1f} to {f['high']:.1f})"
        rescan = r.get("rescan", "") if job[0] == "clean" else done.get(("rescan", *job[1:]), {}).get("verdict", "")
        asr = " / ".join(f"{v:.2f}" for v in r["asr"].values()) if "asr" in r else "-"
        rest = " | ".join(f"{r[k]:.3f}" if k in r else "-" for k in ("mse", "ssim", "diversity_ratio"))
        done_by = "none | -"
        if job[0] == "repair":
            done_by = f"{job[2]}, {REPAIR_STEPS} updates | {r['images']} {job[3]}"
        if job[0] == "clean":
            done_by = f"`elijah clean`, {r['updates']} updates | {r['images']} synthetic"
        lines.append(f"| {job[1]} | {done_by} | {asr} | {rest} | {r['drift_from_base']:.4f} | {fid} | {rescan} |")
    lines += ["", "## The baseline detector (Elijah, lambda 0.5, DDPM-1000, 16 samples)", "",
              "| model | scores | evaluations | seconds |", "|---|---|---|---|"]  # fmt: skip
    for job, r in done.items():
        if job[0] == "elijah":
            shown = ", ".join(f"{k} {v:.4f}" for k, v in r["scores"].items())
            lines.append(f"| {job[1]} | {shown} | {r['cost']['network_evaluations']} | {r['cost']['seconds']:.0f} |")
    (STUDY.results / "TABLES.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("command", choices=("run", "job", "tables"))
    parser.add_argument("job", nargs="*")
    parser.add_argument("--workers", type=int, default=2)
    arguments = parser.parse_args()
    if arguments.command == "run":
        return run(arguments.workers)
    if arguments.command == "job":
        run_job(tuple(arguments.job))
    else:
        tables()
    return 0


if __name__ == "__main__":
    sys.exit(main())
