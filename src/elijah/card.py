"""The model card of a repaired folder: what was found, what was done, what the rescan says, before and after."""

from __future__ import annotations

from huggingface_hub import ModelCard, ModelCardData

from elijah.report import CleaningInfo, CleanReport

PICTURES = {  # files beside the card: the key of CleaningInfo that each one shows
    "triggered-before.png": "samples_before_png",
    "triggered-after.png": "samples_after_png",
    "clean-before.png": "benign_before_png",
    "clean-after.png": "benign_after_png",
}


def model_card(report: CleanReport) -> str:
    """The README.md of the new folder; the pictures are the files of PICTURES."""
    assert report.before and report.cleaning
    done, found = report.cleaning, report.before
    rows = "\n".join(
        f"| {name} | {cell(done.before.get(name))} | {cell(done.after.get(name))} |"
        for name in dict.fromkeys([*done.before, *done.after])
    )
    data = ModelCardData(library_name="diffusers", tags=["elijah", "unconditional-image-generation"])
    warning = "" if report.verdict == "clean" else f"\n**The rescan of this folder says: {report.verdict}.**\n"
    if done.harm:
        warning = f"\n**The repair harmed the model: {plain('; '.join(done.harm))}.**\n"
    repaired = "; ".join(f"{plain(f.matches)} (loss ratio {f.loss_ratio:.3g})" for f in done.findings)
    text = f"""---
{data.to_yaml()}
---

# Repaired copy of {plain(report.before.model.source)}

Elijah {report.tool.version} scanned the original, found it **{found.verdict}** ({plain(found.reason)}),
and repaired it with `{done.repair}`: {done.updates} updates on {done.images} images ({plain(done.data)};
{plain(done.screening)}). Repaired: {repaired}.
The rescan with fresh seeds says **{report.verdict}**: {plain(report.reason)}.
{warning}
| | before | after |
|---|---|---|
{rows}

{pictures(done)}
The original folder was not changed. "Clean" means: nothing was found of what the scan covers, which is
{plain("; ".join(report.coverage))}. Not covered: {plain("; ".join(report.not_covered))}.
"""
    return str(ModelCard(text))


def pictures(done: CleaningInfo) -> str:
    """The pictures side by side, before and after; empty when there are none."""
    if not all(getattr(done, key) for key in PICTURES.values()):
        return ""
    return """| | before | after |
|---|---|---|
| noise with the found trigger | ![before](triggered-before.png) | ![after](triggered-after.png) |
| the same noise without it | ![before](clean-before.png) | ![after](clean-after.png) |
"""


def cell(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def plain(text: str) -> str:
    """text on one line, without the characters that Markdown and HTML read as markup."""
    kept = "".join(c if c.isprintable() else " " for c in text)
    return "".join("\\" + c if c in "`*_[]<>|\\#" else c for c in kept)
