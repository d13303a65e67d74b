"""The report: all of it from manifest and records, escaped, self-contained, accessible, the same every time."""

from __future__ import annotations

import json
import re
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from job.common import formatting
from job.records import Artifact, GroupSpec
from job.report import report
from job.report.model_card import render_model_card
from job.results.reader import scored_in
from job.runs.layout import REPORT
from tests.example_run import HASH, answers, evidence, publish, results
from tests.published_run import pairs, publish_run

CSS = (Path(report.__file__).parent / "templates/report.css").read_text(encoding="utf-8")
HOSTILE = "</p><script>alert(1)</script><img src=x onerror=alert(2)> & \"quotes\" 'too'"
VOID = {"meta", "link", "wbr", "br", "img", "path"}


class Page(HTMLParser):
    """A page as a list of (tag, attributes) and all of its text; fails where tags are not closed in order."""

    def __init__(self, content: bytes) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(content.decode())
        self.close()
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps a tag."""
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Keeps a tag that closes itself, as in SVG."""
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        """Closes the tag that was opened last."""
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        """Adds to the text."""
        self.text += data

    def all(self, *names: str) -> list[dict[str, str | None]]:
        """The attributes of all tags of these names."""
        return [attributes for tag, attributes in self.tags if tag in names]


@pytest.fixture(scope="module")
def found() -> report.ReportData:
    """Two tasks: one with more changed questions than are shown, one without a change."""
    return evidence(arc_easy=answers(60, 10, 400), piqa=answers(0, 0, 50))


@pytest.fixture(scope="module")
def made(found: report.ReportData) -> dict[str, Any]:
    """Their manifest."""
    return results(found, ["--train.learning_rate", "1e-3", "--lora.alpha", "16", "--fault", "sigterm@step=34"])


@pytest.fixture(scope="module")
def page(made: dict[str, Any], found: report.ReportData) -> Page:
    """The report on them."""
    return Page(report.render_report(made, found))


def test_the_verdict_comes_first(page: Page, made: dict[str, Any]) -> None:
    """A sentence for each verdict as heading, before any figure; then what it rests on."""
    text = " ".join(page.text.split())
    heading = "Better than its quantized base on arc_easy. No difference shown on piqa."
    assert heading in text
    assert text.index(heading) < text.index("Of 400 questions of arc_easy")
    assert made["evaluation"]["tasks"]["arc_easy"]["verdict"] == "improved"
    assert "No question was answered right by only one of the two." in text
    assert [tag for tag, _ in page.tags].count("h1") == 1


@pytest.fixture(scope="module")
def three_arms(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], bytes]:
    """A run whose unquantized base was scored, with a merged model of two candidates; and its report."""
    folder = tmp_path_factory.mktemp("three") / "run"
    right = [(number >= 12, True) if number < 18 else (number >= 40,) * 2 for number in range(200)]
    merged = [adapter or number % 7 == 0 for number, (_, adapter) in enumerate(right)]
    publish_run(
        folder,
        {"quiz": right},
        original={"quiz": [number != 3 for number in range(200)]},
        exported={"original": merged, "dequantized": [adapter for _, adapter in right]},
    )
    made = json.loads((folder / "results.json").read_bytes())
    found = report.read_report_data(made, lambda artifact: folder / artifact.path)
    return made, report.render_report(made, found)


def test_every_figure_of_the_unquantized_base_is_the_manifests(three_arms: tuple[dict[str, Any], bytes]) -> None:
    """Charts, table and exports have the accuracies, differences, intervals, p values and verdicts as recorded."""
    made, content = three_arms
    page, text = Page(content), " ".join(re.sub(r"<[^>]*>", " ", content.decode()).split())
    one, task = made["evaluation"]["full_precision"]["tasks"]["quiz"], made["evaluation"]["tasks"]["quiz"]

    def interval(found: dict[str, Any], between: str) -> str:
        low, high = map(formatting.points, found["ci95"])
        return f"{formatting.points(found['delta'])}{between}{low} to {high}"

    said = [str(picture.get("aria-label")) for picture in page.all("svg") if picture.get("aria-label")]
    for metric in ("acc", "acc_norm"):
        for side, name in (("original", "unquantized"), ("base", "quantized"), ("adapter", "adapter")):
            accuracy = (one["scores"] if side == "original" else task[side])[metric]
            assert any(label.startswith(f"{name}, {metric}: {formatting.percent(accuracy)} (") for label in said)
        differences = {
            "quantization": one["base_versus_original"][metric],
            "training": task if metric == "acc" else task[metric],
            "both": one["adapter_versus_original"][metric],
        }
        for name, found in differences.items():
            assert f"{name}, {metric}: {interval(found, ' points (')})" in said
            counts = f"{found['improved']} {found['regressed']} {formatting.p_value(found['holm_p'])}"
            assert f"{metric}, {name} {found['verdict']} {counts}" in text
    assert len(said) >= 12
    for candidate in made["exports"][0]["candidates"].values():
        found = candidate["quiz"]
        rest = " ".join(interval(found[f"versus_{side}"]["acc"], " ") for side in ("base", "adapter", "original"))
        assert f"{100 * found['scores']['acc']:.2f} % {rest}" in text
        against = f", against adapter: {interval(found['versus_adapter']['acc'], ' points (')})"
        assert any(label.endswith(against) for label in said)
        assert any(
            label.startswith("merged onto") and formatting.percent(found["scores"]["acc"]) in label for label in said
        )


def test_groups_are_drawn(tmp_path: Path) -> None:
    """Each figure of a group has its difference and interval in a chart, coloured by its verdict."""
    spec = GroupSpec("1", ("quiz", "riddles"), {"acc,none": True}, {"acc,none": True})
    folder = publish_run(tmp_path / "run", {"quiz": pairs(60, improved=40), "riddles": pairs(20)}, groups={"own": spec})
    made = json.loads((folder / "results.json").read_bytes())
    page = Page(report.render_report(made, report.read_report_data(made, lambda artifact: folder / artifact.path)))
    found = made["evaluation"]["groups"]["own"]["metrics"]["acc,none"]
    low, high = found["ci95"]
    said = [str(picture.get("aria-label")) for picture in page.all("svg")]
    assert f"own, acc,none: {found['delta']:+.3g} ({low:+.3g} to {high:+.3g})" in said


def test_every_section_is_there(page: Page) -> None:
    """Accuracy, questions, training, attempts, cost, settings, provenance and artifacts, each reachable by a link."""
    sections = [attributes["id"] for attributes in page.all("section")]
    assert sections == [
        *("accuracy", "questions", "training", "attempts", "cost", "settings", "provenance", "artifacts"),
    ]
    links = {str(attributes["href"]).removeprefix("#") for attributes in page.all("a")}
    assert links == {*sections, "content"}


def test_the_questions_that_changed_can_be_read(page: Page) -> None:
    """Both ways, in the order they were asked, up to a limit that is told."""
    text = " ".join(page.text.split())
    assert "60 questions got better" in text
    assert "10 questions got worse" in text
    assert f"The first {report.MAX_QUESTIONS} of 60, in the order they were asked." in text
    assert text.count("What is 0 and one?") == 1
    assert f"What is {report.MAX_QUESTIONS - 1} and one?" in text
    assert f"What is {report.MAX_QUESTIONS} and one?" not in text


def test_settings_that_differ_are_told(made: dict[str, Any], page: Page) -> None:
    """Those that were given and are not the preset's, with the preset's value; not the run's name."""
    rows = {row["name"]: row for row in report.own_settings(made["settings"])}
    assert rows.keys() == {"fault", "train.learning_rate"}
    assert rows["train.learning_rate"] == {
        "name": "train.learning_rate",
        "value": "0.001",
        "preset": "0.0002",
        "source": "command line",
    }
    assert "sigterm@step=34" in page.text


def test_settings_of_an_unknown_preset_are_told_by_their_source(made: dict[str, Any]) -> None:
    """A manifest of another version may name a preset that is not known here."""
    other = {**made["settings"], "preset": {"value": "of-the-future", "source": "command line"}}
    names = [row["name"] for row in report.own_settings(other)]
    assert names == ["fault", "lora.alpha", "train.learning_rate"]


def test_attempts_and_their_cost_are_told(page: Page) -> None:
    """Each attempt with how it ended and what it did; preemptions, repeated steps, money."""
    text = " ".join(page.text.split())
    assert "Attempt 1 preempted after 5 min 0 s" in text
    assert "steps 45 to 94, at least 10 of them repeated" in text
    assert "started 55 min 0 s later" in text
    assert "28: nothing to learn: the text or the answer is empty" in text
    assert "At least 10 steps had to be computed again" in text
    assert "$0.60" in text
    labels = [str(attributes["aria-label"]) for attributes in page.all("div") if attributes.get("role") == "img"]
    assert labels[2].startswith("Attempt 3: pull 10.0\N{NO-BREAK SPACE}s, ")
    assert labels[2].endswith("train 4 min 10 s, evaluate adapter 1 min 10 s")


def test_a_fuller_account_of_the_cost_is_told_too(made: dict[str, Any], found: report.ReportData) -> None:
    """Dollars by stage, wasted dollars, savings and energy stand in the report where the manifest has them."""
    cost = {
        **made["cost"],
        "stages": {"train": {"seconds": 420.0, "usd": 0.29}, "outside stages": {"seconds": 170.0, "usd": None}},
        "attempts": [{"usd": 0.1 * number, "wasted_usd": 0.01 * number} for number in (1, 2, 3)],
        "wasted_seconds": 61.5,
        "wasted_usd": 0.04,
        "savings": {"on_demand_usd_per_hour": 5.0, "usd": 0.6, "percent": 50.0, "net_usd": 0.52, "net_percent": 46.4},
        "energy_kwh": 0.125,
    }
    text = " ".join(Page(report.render_report({**made, "cost": cost}, found)).text.split())
    for told in ("$0.29", "$0.30", "$0.03", "1 min 2 s, $0.04", "$0.52, 46 % of the on-demand price", "0.125 kWh"):
        assert told in text


def test_the_exported_run_is_named(made: dict[str, Any], found: report.ReportData) -> None:
    """At the top, and which attempts are its."""
    exported = {"id": "trained", "results_sha256": "0" * 64, "attempts": 2}
    text = " ".join(
        Page(report.render_report({**made, "run": {**made["run"], "exported_run": exported}}, found)).text.split()
    )
    assert ", which exports run trained" in text
    assert "Of the exported run trainedattempts 1 to 2" in text  # a name and its value


def judged(*reasons: str) -> dict[str, Any]:
    """A gate that was set, and what it said."""
    return {
        "metric": "acc",
        "min_delta": None,
        "max_regression": 0.01,
        "baseline": None,
        "passed": not reasons,
        "reasons": list(reasons),
    }


def test_a_gate_is_told(found: report.ReportData) -> None:
    """Whether it was passed, and why not; nothing where none was set."""
    missed = results(found, gate=judged("piqa: acc may have lost 0.0700, the gate allows 0.0100"))
    text = " ".join(Page(report.render_report(missed, found)).text.split())
    assert "Quality gate on acc: not passed. piqa: acc may have lost 0.0700" in text
    passed = results(found, gate=judged())
    assert "Quality gate on acc: passed." in report.render_report(passed, found).decode()
    # of an older run, which does not say what its baseline was scored in, and of one scored otherwise
    for dtype, told in (({}, False), ({"dtype": scored_in(passed)["dtype"]}, False), ({"dtype": "fp8"}, True)):
        passed["gate"]["baseline"] = {"run": "one", "results": "one", "sha256": "0" * 64, "tasks": {}, **dtype}
        assert ("Run one was scored in fp8" in report.render_report(passed, found).decode()) == told


def test_policy_and_audit_are_told(found: report.ReportData) -> None:
    """Each rule with its outcome, and what an undecided one means; findings by file and row; headers have scopes."""
    rule = {"task": "piqa", "role": "critical", "kind": "max_detectable_effect", "threshold": 0.01, "n": 50}
    made = results(found)
    made["gate"] |= {
        "passed": True,
        "policy": {"outcome": "inconclusive", "rules": [{**rule, "found": 0.2, "outcome": "inconclusive"}]},
    }
    check = {"action": "record", "checked_by": "this project", "not_checked": "", "rows": 7}
    places = ["rows.jsonl:3", "rows.jsonl:9", "more.jsonl:1"]
    checks = {"iban": {**check, "places": places}, "card": {**check, "rows": 0, "places": []}}
    made["dataset"]["audit"] = {"rows": 80, "left_out": 0, "too_short": 0, "compared": 80, "checks": checks}
    page = Page(report.render_report(made, found))
    text = " ".join(page.text.split())
    assert "No rule is missed, but the questions cannot decide all of them; the policy lets that pass." in text
    assert "its 50 questions can detect a difference of 0.2000 or more" in text
    assert "Rows with a bank account (IBAN)" in text
    assert "rows.jsonl: 3, 9; more.jsonl: 1 and 4 more" in text
    assert all(header["scope"] in {"col", "row"} for header in page.all("th"))


def test_nothing_is_loaded_and_nothing_runs(page: Page, made: dict[str, Any], found: report.ReportData) -> None:
    """No script, no outside address, no form; and a policy that would stop them."""
    assert page.all("script", "img", "iframe", "object", "form", "input", "base") == []
    content = report.render_report(made, found).decode()
    assert re.findall(r"https?://|url\(|@import|src=", content) == []
    (policy,) = [a["content"] for a in page.all("meta") if a.get("http-equiv") == "Content-Security-Policy"]
    assert str(policy).startswith("default-src 'none';")
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)


def test_everything_from_the_run_is_text() -> None:
    """Names, settings, questions, choices and paths that look like markup are shown as they are."""
    base, adapter = answers(2, 1, 10)
    for record in (*base, *adapter):
        record["question"], record["choices"] = HOSTILE, [HOSTILE] * 3
    found = evidence(**{HOSTILE: (base, adapter)})
    made = results(found, ["--model.id", "a/b", "--data.source", HOSTILE], run_id=HOSTILE, gate=judged(HOSTILE))
    made["artifacts"] = [asdict(Artifact(HOSTILE, 1, HASH))]
    made["training"]["substitutions"] = [HOSTILE]
    made["run"]["attempts"][0]["outcome"] = HOSTILE
    made["run"]["attempts"][0]["stage_seconds"][HOSTILE] = 1.0
    for part in ("model", "dataset", "hardware", "software"):
        made[part] = {key: HOSTILE if isinstance(value, str) else value for key, value in made[part].items()}
    page = Page(report.render_report(made, found))
    assert page.all("script", "img") == []
    assert not any(name.startswith("on") for _, attributes in page.tags for name in attributes)
    assert page.text.count(HOSTILE) > 20


def test_halves_of_characters_do_not_stop_it() -> None:
    """JSON can hold a lone surrogate, which UTF-8 cannot; and control characters."""
    base, adapter = answers(1, 0, 3)
    for record in (*base, *adapter):
        record["question"] = "half \ud83d and \x00 control"
    found = evidence(arc_easy=(base, adapter))
    assert b"half ? and" in report.render_report(results(found), found)


def test_the_same_run_gives_the_same_bytes(made: dict[str, Any], found: report.ReportData, tmp_path: Path) -> None:
    """Drawn from the published files it is what was published, though the manifest lists the report itself by then."""
    first = report.render_report(made, found)
    assert report.render_report(made, found) == first
    complete = publish(tmp_path, found, made)
    before = report.render_report(complete, found)
    listed = {**complete, "artifacts": [*complete["artifacts"], asdict(Artifact(REPORT, len(before), HASH))]}
    read = report.read_report_data(listed, lambda artifact: tmp_path / artifact.path)
    assert read == found
    assert report.render_report(listed, read) == before


def test_who_cannot_see_is_told(page: Page) -> None:
    """Accessibility: language, title, landmarks, a name for every picture, headers with scope, no broken references."""
    (html,) = page.all("html")
    assert html["lang"] == "en"
    assert len(page.all("title")) > 1
    for landmark in ("header", "nav", "main", "footer"):
        assert page.all(landmark)
    pictures = page.all("svg")
    assert len(pictures) > 6
    for picture in pictures:
        assert picture["role"] == "img"
        assert picture.get("aria-label") or picture.get("aria-labelledby")
    for header in page.all("th"):
        assert header["scope"] in {"col", "row"}
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        assert set(str(attributes.get("aria-labelledby") or "").split()) <= set(ids)
    for region in page.all("div"):
        if region.get("role") == "region":
            assert region["aria-label"]
            assert region["tabindex"] == "0"


def colours(scheme: str) -> dict[str, str]:
    """The colours of a scheme by name; print has its own."""
    blocks = re.findall(r":root \{([^}]*)\}", CSS)
    assert len(blocks) == 3
    pairs = [dict(re.findall(r"--([\w-]+): (#[0-9a-f]{3,6})", block)) for block in blocks]
    return pairs[("light", "dark", "print").index(scheme)]


def luminance(colour: str) -> float:
    """Relative luminance by WCAG 2."""
    digits = colour.removeprefix("#")
    digits = digits if len(digits) == 6 else "".join(2 * digit for digit in digits)
    channels = [int(digits[at : at + 2], 16) / 255 for at in (0, 2, 4)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, two: str) -> float:
    """Contrast ratio by WCAG 2."""
    high, low = sorted((luminance(one), luminance(two)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_colours_can_be_told_apart(scheme: str) -> None:
    """Text has a contrast of 4.5 (AA) on the page, what is drawn has 3; all schemes have all colours."""
    assert contrast("#000", "#ffffff") == 21
    palette = colours(scheme)
    assert palette.keys() == colours("light").keys()
    for text in ("ink", "muted", "before", "after", "better", "worse", "even"):
        assert contrast(palette[text], palette["paper"]) >= 4.5, text
    for drawn in ("before", "after", "pull", "worse"):
        assert contrast(palette[drawn], palette["paper"]) >= 3, drawn
        assert contrast(palette[drawn], palette["wash"]) >= 3, drawn


def test_training_in_fp8_is_said() -> None:
    """Report and card name it, for a run that was trained so; others say nothing of it."""
    found = evidence(arc_easy=answers(60, 10, 400))
    plain, made = results(found), results(found)
    execution = {"kept_base": True, "kept_activations": True, "recorded": True, "reason": "it fits", "packed": True}
    made["training"]["execution"] = {**execution, "forward": "fused all, triton, fp8"}
    assert "Products with the frozen weights in FP8" in Page(report.render_report(made, found)).text
    assert "computed in bf16, in training in FP8 (e4m3, one scale for each row) |" in render_model_card(made).decode()
    assert "FP8" not in Page(report.render_report(plain, found)).text + render_model_card(plain).decode()


def test_preferences_are_told_and_drawn() -> None:
    """The report draws margin and accuracy of the rewards by step, and names method, strength and reference."""
    plain = evidence(arc_easy=answers(60, 10, 400))
    metrics = [
        replace(step, preference={"rewards/margins": 0.1 * step.step, "rewards/accuracies": 0.5})
        for step in plain.metrics
    ]
    found = report.ReportData(metrics, plain.answers)
    learned = {"method": "dpo", "beta": 0.2, "reference": "base", "preference": {"rewards/margins": 8.0}}
    made = results(found, ["--train.method=dpo", "--train.beta=0.2"])
    made["training"] |= learned
    page = Page(report.render_report(made, found))
    for words in ("Reward margin", "Reward accuracy", "direct preference optimization (dpo, beta 0.2), compared with"):
        assert words in page.text
    assert "nats a token" not in page.text
    card = render_model_card(made).decode()
    assert "| method | direct preference optimization (dpo, beta 0.2), compared with the base model |" in card
    assert "| rewards/margins in the last epoch | 8" in card
    assert "- dpo\n" in card
    assert "- sft\n" not in card
