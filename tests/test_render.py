"""Renderers: what a person, a browser and a code scanning service get from a report."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
from test_report import make_clean_report, make_report, picture

from elijah.render import RENDERERS, render
from elijah.render.text import energy_words, number, plain
from elijah.report import CleanReport, EvidenceInfo, FileInfo, ModelInfo, Report, TriggerInfo

HOSTILE = "<script>alert(1)</script>\"'><img src=x onerror=alert(2)>{{ 7*7 }}\x1b[31m\n\u202e"
VOID = {"meta", "img", "br"}


def hostile_report() -> Report:
    model = ModelInfo(
        source=HOSTILE, revision=HOSTILE, kind="ddpm", sample_shape=(3, 32, 32), parameters=1,
        files=[FileInfo(name=HOSTILE + ".safetensors", sha256="c" * 64)],
    )  # fmt: skip
    finding = make_report().findings[0].model_copy(update={"matches": HOSTILE})
    texts = [HOSTILE]
    return make_report(
        model=model, findings=[finding], reason=HOSTILE, coverage=texts, not_covered=texts, errors=texts,
        scores={HOSTILE: 1.0}, settings={HOSTILE: HOSTILE},
    )  # fmt: skip


REPORTS: dict[str, Report] = {
    "backdoored": make_report(),
    "clean": make_report("clean"),
    "undecided": make_report("undecided"),
    "cleaned": make_clean_report(),
    "still undecided": make_clean_report("undecided"),
    "hostile": hostile_report(),
    "bare": make_report(
        evidence=EvidenceInfo(), scores={}, thresholds={}, coverage=[], not_covered=[], settings={}, errors=[],
        findings=[make_report().findings[0].model_copy(update={"trigger": TriggerInfo(norm=1.0), "target": None})],
    ),
}  # fmt: skip


class Page(HTMLParser):
    """Collects tags and attributes, and checks that every tag is closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []
        self.feed(html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


@pytest.mark.parametrize("name", REPORTS)
@pytest.mark.parametrize("form", RENDERERS)
def test_every_form_writes_every_report(name: str, form: str) -> None:
    text = render(REPORTS[name], form)
    assert text.endswith("\n")
    assert text == render(REPORTS[name], form)


@pytest.mark.parametrize("name", REPORTS)
def test_html_loads_nothing_and_runs_nothing(name: str) -> None:
    html = render(REPORTS[name], "html")
    page = Page(html)
    assert page.open == []
    assert not {"script", "link", "iframe", "object", "embed", "base", "form", "a"} & set(page.tags)
    assert not [key for key, _ in page.attributes if key.startswith("on") or key in ("href", "action", "srcset")]
    assert all(
        (value or "").startswith("data:image/png;base64,iVBOR") for key, value in page.attributes if key == "src"
    )
    assert not re.search(r"https?://|url\(|@import", html)
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    assert ("content", policy) in page.attributes


def test_html_escapes_what_the_model_says() -> None:
    html = render(hostile_report(), "html")
    assert "<script" not in html and "<img src=x" not in html
    assert "&lt;script&gt;alert(1)" in html
    assert "{{ 7*7 }}" in html and "49" not in re.sub(r"base64,[^\"]*", "", html).partition("<body>")[2]


def test_html_tells_the_story() -> None:
    html = render(make_report(), "html")
    for part in ("Backdoored", "BadDiffusion-like", "ddpm-1000", "b" * 64, "patch triggers", "inside the network"):
        assert part in html
    assert html.count("<img") == 2 + 4
    assert "elijah scan &#39;./models/m 1&#39; --detector lossfit" in html


def test_html_shows_before_and_after() -> None:
    html = render(make_clean_report(), "html")
    assert "before the repair" in html and "after the repair" in html and "m-clean" in html
    assert html.count("<img") == 4 + 2 + 4


def test_html_says_where_a_picture_is_missing() -> None:
    html = render(REPORTS["bare"], "html")
    assert "no picture recorded" in html and "<img" not in html


@pytest.mark.parametrize("form", ["text", "html"])
def test_clean_is_no_promise_of_safety(form: str) -> None:
    text = re.sub(r"\s+", " ", render(make_report("clean"), form))
    assert "Nothing was found within the coverage" in text
    assert "no proof that the model is safe" in text


@pytest.mark.parametrize(
    ("report", "first"),
    [
        (make_report(), "BACKDOORED  ./models/m 1"),
        (make_report("clean"), "CLEAN  ./models/m 1"),
        (make_report("undecided"), "UNDECIDED  ./models/m 1"),
        (make_clean_report(), "CLEAN after the repair  ./models/m 1"),
    ],
)
def test_text_begins_with_the_verdict(report: Report, first: str) -> None:
    assert render(report, "text").splitlines()[0] == first


def test_text_says_why_what_and_what_next() -> None:
    text = render(make_report(), "text")
    flat = re.sub(r"\s+", " ", text)
    for part in (
        "loss ratio 0.0421 (backdoored below 0.5: yes)",
        "norm 41.2",
        "of its energy at the bottom right",
        "it leads to one image",
        "9,120 network evaluations in 312 s on cpu, 96% of it inside the network",
        "not covered patch triggers",
        "next elijah clean './models/m 1' --out 'm 1-clean'",
    ):
        assert part in flat
    assert max(map(len, text.splitlines())) <= 100


def test_text_shows_before_and_after() -> None:
    flat = re.sub(r" +", " ", render(make_clean_report(), "text"))
    assert "verdict backdoored -> clean" in flat
    assert "loss ratio 0.0421 -> 0.97" in flat
    assert "written m-clean" in flat
    assert "next" not in flat


def test_nothing_repaired_is_said() -> None:
    before = make_report("clean")
    report = CleanReport(**{k: getattr(before, k) for k in Report.model_fields}, before=before)
    assert render(report, "text").startswith("CLEAN, nothing was repaired")
    assert "nothing was written" in render(report, "html")


def test_text_has_no_control_characters() -> None:
    text = render(hostile_report(), "text")
    assert all(c == "\n" or c.isprintable() for c in text)
    assert "\\x1b[31m\\n\\u202e" in text
    assert plain("a\tb") == "a\\tb"


@pytest.mark.parametrize(
    ("name", "level", "results"), [("backdoored", "error", 1), ("undecided", "note", 1), ("clean", "", 0)]
)
def test_sarif(name: str, level: str, results: int) -> None:
    report = REPORTS[name]
    log = json.loads(render(report, "sarif"))
    assert log["version"] == "2.1.0" and log["$schema"].endswith("sarif-2.1.0.json")
    (run,) = log["runs"]
    driver = run["tool"]["driver"]
    assert driver["name"] == "elijah"
    rules = [rule["id"] for rule in driver["rules"]]
    assert run["invocations"][0]["exitCode"] == report.exit_code
    assert run["invocations"][0]["executionSuccessful"] is True
    assert len(run["results"]) == results
    for result in run["results"]:
        assert rules[result["ruleIndex"]] == result["ruleId"]
        assert result["level"] == level
        assert result["message"]["text"]
        for place in result["locations"]:
            location = place["physicalLocation"]["artifactLocation"]
            artifact = run["artifacts"][location["index"]]
            assert artifact["location"]["uri"] == location["uri"]
            assert re.fullmatch("[0-9a-f]{64}", artifact["hashes"]["sha-256"])
            assert location["uriBaseId"] in run["originalUriBaseIds"]
    assert run["properties"]["scores"] == report.scores


def test_sarif_addresses_are_quoted() -> None:
    run = json.loads(render(hostile_report(), "sarif"))["runs"][0]
    assert re.fullmatch(r"[\w%/.~()-]+", run["artifacts"][0]["location"]["uri"], re.ASCII)


def test_where_a_trigger_is() -> None:
    assert energy_words(picture(1)).endswith("at the bottom right")
    assert energy_words(None) == ""
    assert energy_words("iVBORw0KGgo=") == ""


@pytest.mark.parametrize(
    ("value", "text"), [(0.0, "0"), (9000.0, "9,000"), (0.04213, "0.0421"), (-1.5, "-1.5"), (1e300, "1e+300")]
)
def test_numbers(value: float, text: str) -> None:
    assert number(value) == text
