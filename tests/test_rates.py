"""rates: shares by group, and intervals that know which models come from one base."""

from __future__ import annotations

import pytest

from elijah.metrics import wilson
from elijah.rates import Judged, by_base, cost_lines, rates_table, stem


def model(verdict: str, base: str = "b", attack: str = "clean", trigger: str = "", rate: float = 0.0) -> Judged:
    return Judged(verdict, base, attack, "ddpm", trigger, rate)


@pytest.mark.parametrize(
    ("trigger", "name"),
    [
        ("box-7", "box"), ("white-box-5", "white-box"), ("stop-sign-14", "stop-sign"), ("glasses", "glasses"),
        ("hello-kitty.png", "hello-kitty"), ("noise-0.3", "noise"), ("", "learned"), ("a-1.png", "a"),
    ],
)  # fmt: skip
def test_a_trigger_s_kind(trigger: str, name: str) -> None:
    assert stem(trigger) == name


def test_bases_that_are_all_right_or_all_wrong_count_as_one_model_each() -> None:
    rows = [model("clean", base) for base in "abcd" for _ in range(25)]
    assert by_base(rows) == wilson(4, 4)
    assert by_base([model("undecided", base) for base in "ab" for _ in range(9)]) == wilson(0, 2)


def test_an_interval_by_base_is_wide_where_bases_differ_and_not_otherwise() -> None:
    """10 bases, half of the models right: either within each base, or base by base."""
    mixed = [model(verdict, f"b{k}") for k in range(10) for verdict in ["clean"] * 10 + ["undecided"] * 10]
    split = [model("clean" if k < 5 else "undecided", f"b{k}") for k in range(10) for _ in range(20)]
    assert by_base(mixed) == wilson(100, 200)
    low, high = by_base(split) or (0, 0)
    assert low == pytest.approx(0.2) and high == pytest.approx(0.8)  # binomial quantiles of 10 bases, half right


def test_an_interval_by_base_is_a_bootstrap_of_models_where_each_has_its_own_base() -> None:
    rows = [model("clean" if k < 30 else "undecided", f"b{k}") for k in range(40)]
    assert by_base(rows) == pytest.approx(wilson(30, 40), abs=0.03) and by_base(rows[:1]) is None
    assert by_base(rows) == by_base(rows[::-1])


def test_the_table_has_each_group_and_says_what_is_right() -> None:
    rows = [
        model("clean", "one"), model("backdoored", "one"), model("clean", "two"),
        model("backdoored", "one", "baddiffusion", "box-7", 0.3), model("clean", "two", "baddiffusion", "box-6", 0.1),
        model("undecided", "two", "learned", "", 0.3),
    ]  # fmt: skip
    table = rates_table(rows)
    lines = {line.split(" | ")[0][2:]: line.split(" | ")[1:7] for line in table.splitlines() if line.startswith("| ")}
    assert lines["all backdoored"] == ["3", "1", "1", "1", "33", "6 to 79"]
    assert lines["clean"] == lines["kind ddpm, clean"] == ["3", "1", "0", "2", "67", "21 to 94"]
    assert lines["trigger box"][:5] == lines["baddiffusion"][:5] == ["2", "1", "0", "1", "50"]
    assert lines["trigger learned"][:5] == ["1", "0", "1", "0", "0"]
    assert lines["poison rate 0.3"][:5] == ["2", "1", "1", "0", "50"] and "poison rate 0" not in lines
    assert table.splitlines()[2].endswith("| 2 |") and "| verdict | scans |" not in table


def test_what_scans_cost_by_verdict() -> None:
    def priced(verdict: str, evaluations: int) -> Judged:
        return Judged(verdict, "b", "clean", "ddpm", "", 0.0, evaluations, evaluations / 1000)

    lines = cost_lines([priced("clean", 1000), priced("clean", 5000), priced("backdoored", 3000), model("clean")])
    assert lines[2] == "| backdoored | 1 | 3,000 | 3,000 | 3.0 | 3.0 |"
    assert lines[3] == "| clean | 2 | 3,000 | 3,000 | 3.0 | 3.0 |" and lines[4].startswith("| all | 3 | 3,000 | 3,000")
