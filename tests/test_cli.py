"""The command line: the table of exit codes, and what goes to which stream."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_report import make_clean_report, make_report

from elijah import __version__, cli, console, files
from elijah.errors import ElijahError, OutOfBudget, Unsupported
from elijah.report import Report

PRELUDE = """
import os, signal, sys, time, types
sys.path.insert(0, {tests!r})
from test_report import make_clean_report, make_report
from elijah.errors import ElijahError, Unsupported
def work(*args, progress, **kw):
    print("library chatter on stdout")
    progress("note: about 3 minutes", 0, 0)
    progress("inverting, loss 0.1", 3, 10)
    {work}
for name in ("scan", "clean"):
    sys.modules["elijah." + name] = types.SimpleNamespace(scan=work, clean=work)
from elijah.cli import main
sys.exit(main())
"""


@pytest.fixture(autouse=True)
def environment() -> Iterator[None]:
    """Takes back what a command sets for the libraries."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def process(work: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """elijah ARGUMENTS in a process of its own, whose scan and clean do what work says."""
    code = PRELUDE.format(tests=str(Path(__file__).parent), work=work)
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True, timeout=60
    )


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Callable[[Any], dict[str, Any]]:
    """stub(result) makes scan and clean return, or raise, result; returns the arguments that they will have got."""

    def install(result: Any) -> dict[str, Any]:
        seen: dict[str, Any] = {}

        def work(*args: Any, **kw: Any) -> Any:
            seen.update(kw, args=args)
            if isinstance(result, BaseException):
                raise result
            return result

        for name in ("scan", "clean"):
            monkeypatch.setitem(sys.modules, f"elijah.{name}", types.SimpleNamespace(scan=work, clean=work))
        return seen

    return install


INTERRUPT = (  # the handler is Python's own again where the tests run with SIGINT ignored, as in a background job
    "signal.signal(signal.SIGINT, signal.default_int_handler); os.kill(os.getpid(), signal.SIGINT); time.sleep(9)"
)


@pytest.mark.parametrize(
    ("work", "arguments", "code", "message"),
    [
        ("return make_report('clean')", "scan M", 0, ""),
        ("return make_report('backdoored')", "scan M", 1, ""),
        ("return make_report('undecided')", "scan M", 3, ""),
        ("return make_report('backdoored')", "scan M --exit-zero", 0, ""),
        ("return make_report('undecided')", "scan M --exit-zero", 0, ""),
        ("return make_clean_report('clean')", "clean M --out D", 0, ""),
        ("return make_clean_report('backdoored')", "clean M --out D", 1, ""),
        ("return make_clean_report('undecided')", "clean M --out D", 3, ""),
        ("raise Unsupported('unet: class-conditional')", "scan M --format json", 3, "unet: class-conditional"),
        ("raise Unsupported('unet: class-conditional')", "scan M --exit-zero", 0, "unet: class-conditional"),
        ("raise ElijahError('M: no such folder')", "scan M --exit-zero", 2, "M: no such folder"),
        ("raise RuntimeError('boom')", "scan M --exit-zero", 2, "internal error: RuntimeError: boom (run with -v"),
        ("sys.exit(1)", "scan M", 2, "internal error: SystemExit: 1"),
        ("raise MemoryError", "clean M --out D", 2, "internal error: MemoryError"),
        (
            INTERRUPT,
            "scan M",
            2,
            "interrupted at inverting, loss 0.1, 3 of 10",
        ),
    ],
)
def test_exit_codes(work: str, arguments: str, code: int, message: str) -> None:
    done = process(work, *arguments.split())
    assert done.returncode == code, done.stderr
    errors = [line for line in done.stderr.splitlines() if line.startswith("elijah: error: ")]
    assert len(errors) == bool(message)
    assert all(message in line for line in errors)
    assert "Traceback" not in done.stderr and "chatter" not in done.stdout
    assert bool(done.stdout) == (not message)
    assert "elijah: about 3 minutes\n" in done.stderr
    assert "\x1b" not in done.stderr + done.stdout and "\r" not in done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "scan",
        "scan A B",
        "scan M --format xml",
        "scan M --seed x",
        "scan M --batch-size 0",
        "scan M --max-minutes nan",
        "scan M --exit-zero --unknown",
        "scan M --calibration none --false-positive-rate 0.1",
        "calibrate R",
        "calibrate R -o C.json --false-positive-rate 0.1",
        "clean M",
        "clean M --out D --data A --synthetic 3",
        "attack baddiffusion M --data D --out O --poison-rate 2",
        "train --data D --out O --from M --prediction epsilon",
        "screen N.npy",
        "screen N.npy --report R.json --format html",
        "unknown",
    ],
)
def test_wrong_usage_is_2(arguments: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(arguments.split()) == 2
    out, err = capsys.readouterr()
    assert out == "" and "Usage: elijah" in err


def test_help_and_version_need_no_torch() -> None:
    code = "import sys; from elijah.cli import main; c = main(); print(*sys.modules, file=sys.stderr); sys.exit(c)"
    for arguments in (["--help"], ["scan", "--help"], ["screen", "--help"], ["--version"]):
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], check=False, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0
        assert not {"torch", "diffusers", "numpy", "rich", "jinja2"} & set(done.stderr.split())
    assert done.stdout == f"elijah {__version__}\n"


def test_a_missing_model_is_2() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "elijah", "scan", "./no/such/folder", "--format", "json"],
        check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert len(done.stderr.splitlines()) == 1 and "no/such/folder" in done.stderr


def test_refused_folders(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from hostile import HOSTILE as hostile

    for code in (2, 3):
        name, builder = next((name, build) for name, (build, expected) in hostile.items() if expected == code)
        assert cli.main(["scan", str(builder(tmp_path / name)), "--format", "json", "--offline"]) == code
        out, err = capsys.readouterr()
        assert out == "" and err.startswith("elijah: error: ") and len(err.splitlines()) == 1


@pytest.mark.parametrize("form", ["text", "json", "html", "sarif"])
def test_stdout_is_the_report_and_nothing_else(form: str, stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    from elijah.render import render

    stub(make_report())
    assert cli.main(["scan", "M", "--format", form]) == 1
    assert capsys.readouterr().out == render(make_report(), form)


def test_the_options_reach_scan(stub: Any) -> None:
    seen = stub(make_report("clean"))
    words = "scan M --detector elijah --seed 3 --device cpu --dtype bfloat16 --batch-size 4 --max-evaluations 9 "
    words += "--max-minutes 0.5 --revision main --offline"
    assert cli.main(words.split()) == 0
    assert callable(seen.pop("progress"))
    assert seen == {
        "args": ("M",), "detector": "elijah", "seed": 3, "device": "cpu", "dtype": "bfloat16", "batch_size": 4,
        "max_evaluations": 9, "max_minutes": 0.5, "revision": "main", "offline": True, "calibration": None,
        "false_positive_rate": 0.01,
    }  # fmt: skip
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_options_reach_clean(stub: Any) -> None:
    seen = stub(make_clean_report())
    assert cli.main(["clean", "M", "--out", "D", "--synthetic", "8", "--repair", "elijah", "--force", "--keep"]) == 0
    expected = {"args": ("M", Path("D")), "data": None, "synthetic": 8, "repair": "elijah", "force": True, "keep": True}
    assert {key: seen[key] for key in expected} == expected


def test_o_writes_the_file_and_leaves_stdout_empty(
    stub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    stub(make_report())
    file = tmp_path / "r.json"
    file.write_text("old")
    assert cli.main(["scan", "M", "--format", "json", "-o", str(file)]) == 1
    assert Report.from_json(file.read_text()) == make_report()
    assert [p.name for p in tmp_path.iterdir()] == ["r.json"]
    assert capsys.readouterr() == ("", f"elijah: wrote {file}\n")
    assert cli.main(["scan", "M", "-q", "-o", str(file)]) == 1
    assert capsys.readouterr() == ("", "")


def test_o_is_checked_before_the_work(stub: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    seen = stub(make_report())
    assert cli.main(["scan", "M", "-o", str(tmp_path)]) == 2
    assert cli.main(["scan", "M", "-o", str(tmp_path / "no" / "r.json")]) == 2
    assert seen == {}
    assert cli.main(["scan", "M", "-o", os.devnull]) == 1
    assert not Path(os.devnull).is_file()


def test_verbose_shows_the_traceback(stub: Any, capsys: pytest.CaptureFixture[str]) -> None:
    stub(ValueError("two\nlines \x1b[31m"))
    assert cli.main(["scan", "M"]) == 2
    assert capsys.readouterr().err.startswith("elijah: error: internal error: ValueError: two lines ?[31m (run with -v")
    assert cli.main(["scan", "M", "-v"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_a_limit_is_3(stub: Any) -> None:
    stub(OutOfBudget("stopped at the limit"))
    assert cli.main(["scan", "M"]) == 3
    assert Unsupported.exit_code == 3 and ElijahError.exit_code == 2


def test_a_bar_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    talk = console.Talk()
    talk("inverting", 1, 2)
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    talk("inverting [bold]", 2, 2)
    talk("note: a line", 0, 0)
    talk("sampling", 1, 9)
    assert talk.position().startswith("sampling, 1 of 9")
    talk.close()
    assert "elijah: a line" in capsys.readouterr().err


@pytest.mark.parametrize("form", ["text", "json", "html", "sarif"])
@pytest.mark.parametrize("document", [make_report(), make_clean_report()])
def test_report_renders_both_kinds(
    form: str, document: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from elijah.render import render

    file = tmp_path / "r.json"
    file.write_text(document.to_json())
    assert cli.main(["report", str(file), "--format", form]) == 0
    assert capsys.readouterr().out == render(document, form)


def test_report_refuses_other_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.json").write_text('{"schema_version": 9}')
    (tmp_path / "b.json").write_bytes(b"\xff\xfe")
    for name in ("a.json", "b.json", "none.json", ""):
        assert cli.main(["report", str(tmp_path / name)]) == 2
        out, err = capsys.readouterr()
        assert out == "" and len(err.splitlines()) == 1


def test_demo_prints_its_own_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def demo(out: Path, *, progress: Any) -> int:
        print("table", out)
        return 0

    monkeypatch.setitem(sys.modules, "elijah.demo", types.SimpleNamespace(demo=demo))
    assert cli.main(["demo", "--out", "D"]) == 0
    assert capsys.readouterr().out == "table D\n"


def test_a_folder_is_there_in_full_or_not_at_all(tmp_path: Path) -> None:
    def half_way(folder: Path) -> None:
        (folder / "a").write_text("a")
        raise KeyboardInterrupt

    out = files.new_folder(tmp_path / "deep" / "out")
    with pytest.raises(KeyboardInterrupt):
        files.write_folder(out, half_way)
    assert list(out.parent.iterdir()) == []
    files.write_folder(out, lambda folder: (folder / "a").write_text("a") and None)
    assert [p.name for p in out.parent.iterdir()] == ["out"] and (out / "a").is_file()
    with pytest.raises(ElijahError, match="exists already"):
        files.new_folder(out)


def test_train_and_attack(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base, further, attacked = (str(tmp_path / name) for name in ("base", "further", "attacked"))
    small = ["--data", "digits", "--limit", "16", "--batch-size", "2", "--device", "cpu"]
    (tmp_path / "base.ckpt").write_text("left behind")
    train = ["train", *small, "--out", base, "--size", "8", "--channels", "1", "--steps", "2"]
    assert cli.main(train) == 2
    assert "pass --resume" in capsys.readouterr().err
    (tmp_path / "base.ckpt").unlink()
    assert cli.main(train) == 0
    assert (tmp_path / "base" / "model_index.json").is_file()
    assert cli.main(train) == 2  # it is there already
    assert cli.main(["train", *small, "--out", further, "--from", base, "--steps", "1", "--half", "--resume"]) == 0
    assert cli.main(["train", *small, "--out", further + "2", "--from", base, "--size", "16"]) == 2
    attack = [
        base,
        *small,
        "--out",
        attacked,
        "--trigger",
        "box-3",
        "--target",
        "corner",
        "--steps",
        "1",
        "--seed",
        "5",
    ]
    assert cli.main(["attack", "unknown", *attack]) == 2
    assert cli.main(["attack", "baddiffusion", *attack, "--mode", "bare"]) == 0
    truth = json.loads((tmp_path / "attacked.truth.json").read_text())
    assert (truth["schema_version"], truth["attack"], truth["trigger"], truth["target"]) == (
        1,
        "baddiffusion",
        "box-3",
        "corner",
    )
    assert (truth["mode"], truth["poison_rate"], truth["steps"], truth["batch_size"], truth["seed"]) == (
        "bare",
        0.1,
        1,
        2,
        5,
    )
    assert truth["source"] == base and len(truth["source_files"]) >= 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["attacked", "attacked.truth.json", "base", "further"]
    assert capsys.readouterr().out == ""


def test_an_interrupted_training_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from elijah import making

    def interrupted(*args: Any, checkpoint: Path, progress: Any, **kw: Any) -> None:
        progress("training, loss 1.0", 200, 500)
        checkpoint.write_text("")
        raise KeyboardInterrupt

    monkeypatch.setattr(making, "train", interrupted)
    words = [
        "train",
        "--data",
        "digits",
        "--limit",
        "4",
        "--out",
        str(tmp_path / "m"),
        "--size",
        "8",
        "--device",
        "cpu",
    ]
    assert cli.main(words) == 2
    err = capsys.readouterr().err
    assert "200 of 500" in err and "m.ckpt with --resume" in err
    assert not (tmp_path / "m").exists()
