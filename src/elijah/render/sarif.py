"""The report as SARIF 2.1.0 (OASIS, 2020), for code scanning services and dashboards."""

from __future__ import annotations

import json
from typing import Any
from urllib.parse import quote

from elijah.render.text import finding_words
from elijah.report import Report, command

SCHEMA = "https://json.schemastore.org/sarif-2.1.0.json"
LEVELS = {"backdoored": "error", "undecided": "note", "clean": "none"}
RULE = {
    "id": "ELIJAH001",
    "name": "BackdooredDiffusionModel",
    "shortDescription": {"text": "A trigger in the start noise takes over what the model draws."},
    "fullDescription": {
        "text": "The network answers start noise that carries a hidden pattern with the attacker's target. "
        "The pattern was inverted from the weights and checked by sampling."
    },
    "help": {"text": "Do not use this model. Repair it with `elijah clean MODEL --out DIR`, or take another source."},
    "defaultConfiguration": {"level": "error"},
}


def render_sarif(report: Report) -> str:
    """One run with one result a finding; a verdict of backdoored or undecided without findings is one result."""
    run: dict[str, Any] = {
        "tool": {"driver": {"name": report.tool.name, "semanticVersion": report.tool.version, "rules": [RULE]}},
        "invocations": [_invocation(report)],
        "originalUriBaseIds": {"MODEL": {"description": {"text": f"the model {report.model.source}"}}},
        "artifacts": [
            {"location": _location(file.name), "hashes": {"sha-256": file.sha256}} for file in report.model.files
        ],
        "results": _results(report),
        "columnKind": "unicodeCodePoints",
        "properties": {
            "verdict": report.verdict,
            "reason": report.reason,
            "scores": report.scores,
            "p_value": report.p_value,
            "model": {"source": report.model.source, "revision": report.model.revision, "kind": report.model.kind},
            "coverage": report.coverage,
            "not_covered": report.not_covered,
        },
    }
    return json.dumps({"$schema": SCHEMA, "version": "2.1.0", "runs": [run]}, indent=2) + "\n"


def _invocation(report: Report) -> dict[str, Any]:
    notes = [{"level": "warning", "message": {"text": text}} for text in report.errors]
    return {
        "commandLine": command(report),
        "exitCode": report.exit_code,
        "executionSuccessful": True,
        "toolExecutionNotifications": notes,
    }


def _results(report: Report) -> list[dict[str, Any]]:
    found = [(finding_words(f), {"loss_ratio": f.loss_ratio, "matches": f.matches}) for f in report.findings]
    if not found and report.verdict != "clean":
        found = [(report.reason, {})]
    network = [f.name for f in report.model.files if f.name.endswith(".safetensors")]
    names = [f.name for f in report.model.files]
    where = [
        {"physicalLocation": {"artifactLocation": {**_location(name), "index": names.index(name)}}}
        for name in network or names[:1]
    ] or [{"physicalLocation": {"artifactLocation": {"uri": quote(report.model.source)}}}]
    return [
        {
            "ruleId": RULE["id"],
            "ruleIndex": 0,
            "level": LEVELS[report.verdict],
            "message": {"text": text},
            "locations": where,
            "properties": {**properties, "scores": report.scores, "verdict": report.verdict},
        }
        for text, properties in found
    ]


def _location(name: str) -> dict[str, str]:
    return {"uri": quote(name), "uriBaseId": "MODEL"}
