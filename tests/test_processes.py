"""Several processes of one `elijah clean`: they agree, together they do what one would, and the first alone speaks."""

from __future__ import annotations

import importlib
import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import weights
from safetensors.torch import load_file, save_file
from torch import Tensor

from elijah import cli, processes
from elijah.bases import new_model
from elijah.detection import Detection, Finding
from elijah.diffusion import Model, generator_for
from elijah.repairs import Unshift
from elijah.response import Response
from elijah.scan import make_report
from elijah.training import Optimiser, optimise

SEED, STEPS = 3, 4
HERE = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); "


def tiny() -> Model:
    return new_model((1, 8, 8), seed=0, channels=(8, 8))


def loss(model: Model, g: torch.Generator) -> Tensor:
    """Of two rows."""
    x, t = torch.randn((2, 1, 8, 8), generator=g), torch.randint(model.T, (2,), generator=g)
    return (model.output(x, t) - x.abs()).square().mean()


def train_and_say(folder: str) -> None:
    """What each process of the first test does: trains, and says what it and the others think."""
    said: list[int] = []

    def each(k: int, _: Model) -> None:
        said.append(k)

    model = optimise(tiny(), loss, Optimiser(STEPS, lr=1e-3), seed=SEED, each=each)
    mine = {"said": torch.tensor(said), "agreed": torch.tensor(processes.agreed(7 + processes.rank()))}
    save_file(dict(weights(model)) | mine, f"{folder}/{processes.rank()}.safetensors")


def clean_and_end(source: str, folder: str) -> None:
    """What each process of the second test does: cleans, with scans that find something and then nothing."""
    cleaning: Any = importlib.import_module("elijah.clean")
    said = ["backdoored", "clean"]

    def inspect(model: Model, settings: dict[str, Any], seed: int, _: object) -> Any:
        verdict, shape = said.pop(0), model.sample_shape
        found = Finding(Response(1.0, 1.0), torch.full(shape, 0.5), torch.ones(shape), 0.1, "BadDiffusion-like")
        detection = Detection("lossfit", [found], {}, [], verdict, f"it is {verdict}")
        return detection, make_report(model, detection, 1.0, settings, seed)

    cleaning.inspect = inspect
    cleaning.REPAIRS = {"unshift": partial(Unshift, steps=3)}
    how = ("--synthetic", "8", "--keep", "--format", "json", "-o", f"{folder}/report.json")
    sys.exit(cli.main(["clean", source, "--out", f"{folder}/out", *how]))


def launch(*command: str) -> list[tuple[int, str, str]]:
    """Exit code, stdout and stderr of two processes of a Python command, as accelerate and torchrun start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    usual = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
                          "CUDA_VISIBLE_DEVICES": ""}  # fmt: skip
    started = [
        subprocess.Popen([sys.executable, *command], env=usual | {"RANK": str(k), "LOCAL_RANK": str(k)}, text=True,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for k in range(2)
    ]  # fmt: skip
    try:
        ended = [process.communicate(timeout=300) for process in started]
    finally:
        for process in started:
            process.kill()
    return [(process.returncode, *said) for process, said in zip(started, ended, strict=True)]


def test_two_processes_are_one_with_twice_the_rows(tmp_path: Path) -> None:
    for code, _, error in launch("-c", f"{HERE}import test_processes as t; t.train_and_say({str(tmp_path)!r})"):
        assert code == 0, error
    one, other = (load_file(tmp_path / f"{k}.safetensors") for k in range(2))
    assert one["said"].tolist() == other["said"].tolist() == list(range(1, STEPS + 1))
    assert int(one["agreed"]) == int(other["agreed"]) == 7

    def both(model: Model, g: torch.Generator) -> Tensor:
        k = steps.pop(0)
        parts = [loss(model, generator_for(SEED, k + STEPS * rank)) for rank in range(2)]
        return torch.stack(parts).mean()

    steps = list(range(STEPS))
    alone = weights(optimise(tiny(), both, Optimiser(STEPS, lr=1e-3), seed=SEED))
    for name, expected in alone.items():
        assert torch.equal(one[name], other[name])
        torch.testing.assert_close(one[name], expected, rtol=1e-4, atol=1e-6)


def test_a_cleaning_by_two_processes(tiny_folder: Path, tmp_path: Path) -> None:
    call = f"import test_processes as t; t.clean_and_end({str(tiny_folder)!r}, {str(tmp_path)!r})"
    (first, out, error), (second, other_out, other_error) = launch("-c", HERE + call)
    assert (first, second) == (0, 0), error + other_error
    assert "wrote" in error and (out, other_out, other_error) == ("", "", "")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "report.json"]
    assert (tmp_path / "out" / "model_index.json").is_file()


def test_other_commands_say_that_they_are_not_divided(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["scan", str(tmp_path)]) == 2
    assert "this command runs in one process; several can share `elijah clean` alone" in capsys.readouterr().err


def test_several_processes_choose_their_devices(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert cli.main(["clean", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 2
    assert "--device cpu: several processes take a GPU each, or all the CPU" in capsys.readouterr().err
    monkeypatch.setenv("LOCAL_RANK", "1")
    for gpus, name in ((2, "cuda:1"), (1, "")):
        monkeypatch.setattr(torch.cuda, "device_count", lambda gpus=gpus: gpus)
        assert processes.device() == name  # one GPU for two: neither takes it, or they would wait for each other


def test_a_single_process_takes_all_rows_and_its_own_word(monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.share_of(32) == 32 and processes.agreed("x") == "x" and processes.device() == ""
    monkeypatch.setenv("RANK", "3")  # as some clusters set it for every job
    assert processes.rank() == 0
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert processes.rank() == 3
    assert processes.share_of(32) == 8 and processes.share_of(2) == 1
