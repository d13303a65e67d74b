"""The demo, preempted twice: its report in a browser, made again from what was published; its adapter and card.

SCREENSHOTS names a folder to keep the pictures in: phone, desktop, dark and print.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import boto3
import pytest

from job.report.changed_answers import changed_answers
from job.report.report import read_report_data, render_report
from job.runs.layout import CARD, REPORT
from tests import warm
from tests.helpers import read_jsonl
from tests.s3_server import BUCKET, CREDENTIALS, credentials, moto_server

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>document.title = 'run'</script><img src=x onerror=\"document.title = 'run'\">"
A4_WIDTH = 794


def job(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """One start of the command line."""
    return warm.run(list(words), {**os.environ, "JOB_RUN__SPOT_NOTICES": "off", **environment})


@dataclass(frozen=True)
class Run:
    """A finished run: its folder, and its manifest."""

    folder: Path
    results: dict[str, Any]

    @property
    def report(self) -> Path:
        """The published page."""
        return self.folder / REPORT


@pytest.fixture(scope="module")
def twice(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The demo, preempted after two of its steps."""
    output = tmp_path_factory.mktemp("report")
    changes = {"JOB_RUN__ID": "preempted-twice", "JOB_FAULT": "sigterm@step=12,sigterm@step=27"}
    changes |= {
        "JOB_COST__USD_PER_HOUR": "1.20",
        "JOB_RUN__OUTPUT": str(output),
        "JOB_CHECKPOINT__EVERY_STEPS": "10",
    }
    codes = [job("run", "--preset", "demo", **changes).returncode for _ in range(3)]
    assert codes == [75, 75, 0]
    folder = output / "preempted-twice"
    return Run(folder, json.loads((folder / "results.json").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, or what is like it."""
    if BROWSER is None:
        pytest.skip("there is no chromium on this machine; apt-get install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=BROWSER, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where screenshots go."""
    folder = Path(os.environ.get("SCREENSHOTS") or tmp_path_factory.mktemp("screenshots")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def opened(browser: Any, path: Path, **options: Any) -> tuple[Any, list[str]]:
    """A page, and everything that went wrong with it or was asked of the network; the list goes on growing."""
    page = browser.new_page(**options)
    wrong: list[str] = []
    page.on("console", lambda message: wrong.append(f"console: {message.text}"))
    page.on("pageerror", lambda error: wrong.append(f"error: {error}"))
    page.on("request", lambda request: request.url.startswith(("file:", "data:")) or wrong.append(request.url))
    page.goto(path.as_uri(), wait_until="networkidle")
    return page, wrong


@pytest.mark.parametrize(
    ("name", "width", "options"),
    [
        ("phone", 390, {"device_scale_factor": 2, "is_mobile": True, "has_touch": True}),
        ("narrow phone", 360, {"is_mobile": True, "has_touch": True}),
        ("desktop", 1280, {}),
        ("dark", 1280, {"color_scheme": "dark"}),
        ("print", A4_WIDTH, {"color_scheme": "dark"}),
    ],
)
def test_it_opens_without_an_error(
    twice: Run, browser: Any, pictures: Path, *, name: str, width: int, options: dict[str, Any]
) -> None:
    """Nothing in the console, nothing from the network, and no page wider than its window."""
    page, wrong = opened(browser, twice.report, viewport={"width": width, "height": 844}, **options)
    if name == "print":
        page.emulate_media(media="print")
        page.pdf(path=pictures / "print.pdf", prefer_css_page_size=True)
    page.screenshot(path=pictures / f"{name.replace(' ', '-')}.png", full_page=True)
    scroll, background, heading = page.evaluate(
        "[document.documentElement.scrollWidth, getComputedStyle(document.body).backgroundColor,"
        " document.querySelector('h1').innerText]"
    )
    page.close()
    assert wrong == []
    assert scroll <= width
    assert background == ("rgb(16, 19, 23)" if name == "dark" else "rgb(255, 255, 255)")
    said = "Better than its base on arc_easy (questions of questions.jsonl), quantized or not."
    assert heading.split() == said.split()


def test_it_is_read_aloud_well(twice: Run, browser: Any) -> None:
    """Every picture has a name for those who cannot see it, every column a header; what is shown more can be opened."""
    page, wrong = opened(browser, twice.report)
    pictures = page.get_by_role("img").all()
    assert len(pictures) >= 13  # six intervals, four lines, three attempts
    names = page.evaluate(
        "[...document.querySelectorAll('[role=img]')].map(e => e.ariaLabel ||"
        " e.getAttribute('aria-labelledby').split(' ').map(id => document.getElementById(id).textContent).join(' '))"
    )
    assert all(name.strip() for name in names)
    assert page.get_by_role("heading", level=1).count() == 1
    assert page.get_by_role("columnheader").count() > 12
    assert page.get_by_role("main").count() == page.get_by_role("navigation").count() == 1
    closed = page.get_by_text("Show 35 more")
    hidden = page.locator("details li.q").first
    assert not hidden.is_visible()
    closed.click()
    assert hidden.is_visible()
    page.close()
    assert wrong == []


def test_a_question_that_is_a_script_does_not_run(twice: Run, browser: Any, tmp_path: Path) -> None:
    """Whatever a data set holds, it is text in the report, also for a browser."""
    evidence = read_report_data(twice.results, lambda artifact: twice.folder / artifact.path)
    for records in evidence.answers["arc_easy"]:
        for record in records:
            record["question"], record["choices"] = HOSTILE, [HOSTILE] * 4
    path = tmp_path / "hostile.html"
    path.write_bytes(render_report(twice.results, evidence))
    page, wrong = opened(browser, path)
    assert page.title().startswith("preempted-twice")
    assert page.locator("li.q p").first.inner_text() == HOSTILE
    assert page.locator("script, img").count() == 0
    page.close()
    assert wrong == []


def test_it_tells_what_happened(twice: Run) -> None:
    """Three attempts, two of them preempted; the questions with their texts; the settings that were given."""
    content = twice.report.read_text(encoding="utf-8")
    assert re.findall(r'<b>Attempt (\d)</b> <b class="outcome-(\w+)">', content) == [
        ("1", "preempted"),
        ("2", "preempted"),
        ("3", "complete"),
    ]
    better, worse = changed_answers(*(_records(twice, side) for side in ("base", "adapter")))
    task = twice.results["evaluation"]["tasks"]["arc_easy"]
    assert (len(better), len(worse)) == (task["improved"], task["regressed"])
    assert f'<p dir="auto">{better[0].text}</p>' in content
    assert "sigterm@step=12" in content


def test_the_gain_is_what_the_readme_says(twice: Run) -> None:
    """The promise of the demo: significant (p < 0.01 by McNemar's test), and the README's shares, rounded."""
    task = twice.results["evaluation"]["tasks"]["arc_easy"]
    assert task["verdict"] == "improved"
    assert task["mcnemar_p"] < 0.01
    (questions,) = re.findall(r"`arc_easy` has (\d+) made-up questions", README)
    ((before, after),) = re.findall(r"(\d+) % of the questions answered correctly before training, (\d+) %", README)
    assert task["n"] == int(questions)
    assert [round(100 * task[side]["acc"]) for side in ("base", "adapter")] == [int(before), int(after)]


def test_the_readmes_code_prints_what_it_says(twice: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """The script that loads the adapter prints the answer that the README names; it is the right one."""
    told, code = README.partition("## Use the adapter")[2].split("```python\n")[:2]
    (answer,) = re.findall(r"the adapter's answer, `(\w+)`, which is right", " ".join(told.split()))
    code = code.partition("```")[0].replace("job/demo/base", str(ROOT / "job/demo/base"))
    exec(re.sub(r'"runs/[^"]*"', repr(str(twice.folder / "artifacts/adapter")), code), {})  # what a user does
    (prompt,) = re.findall(r'tokenizer\("(.*?)"', code)
    prompt = prompt.replace("\\n", "\n")
    said = capsys.readouterr().out.partition(prompt)[2]
    assert re.match(rf" {answer}\s", said)
    name = prompt.removeprefix("Question: ").split()[0]
    questions = read_jsonl(ROOT / "job/demo/questions.jsonl")
    asked = [one for one in questions if name in one["question"] and answer in one["choices"]["text"]]
    right = {one["choices"]["text"][one["choices"]["label"].index(one["answerKey"])] for one in asked}
    assert right == {answer}


def _records(run: Run, side: str) -> list[dict[str, Any]]:
    return read_jsonl(run.folder / f"artifacts/evaluation/arc_easy.{side}.jsonl")


def test_it_can_be_drawn_again(twice: Run, tmp_path: Path) -> None:
    """`report` on a folder, and on a bucket, gives the bytes that were published."""
    done = job("report", str(twice.folder), "--output", str(tmp_path / "local.html"))
    assert (done.returncode, done.stdout) == (0, f"report: {tmp_path}/local.html\n"), done.stderr
    assert (tmp_path / "local.html").read_bytes() == twice.report.read_bytes()
    with credentials(), moto_server() as url:
        client = boto3.client("s3", endpoint_url=url)
        for path in ["results.json", *(artifact["path"] for artifact in twice.results["artifacts"])]:
            client.upload_file(str(twice.folder / path), BUCKET, f"runs/twice/{path}")
        words = (f"s3://{BUCKET}/runs/twice/results.json", f"--output={tmp_path}/s3.html", "--storage.retries", "2")
        done = job("report", *words, **CREDENTIALS, JOB_STORAGE__ENDPOINT_URL=url)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s3.html").read_bytes() == twice.report.read_bytes()


@pytest.mark.parametrize(
    ("words", "why"),
    [
        ([], "RUN: is missing; give the path or URI of a run"),
        (["--output", "x.html"], "RUN: is missing; give the path or URI of a run"),
        (["nowhere"], "is not a run"),
        (["nowhere", "--output"], "needs a value"),
        (["{run}", "--output", "no/such/folder/x.html"], "its folder does not exist"),
        (["nowhere", "--storage.retreis", "2"], "the nearest is"),
    ],
)
def test_a_mistake_is_answered(twice: Run, words: list[str], why: str) -> None:
    """Exit code 2, and what is wrong; no traceback, no file."""
    done = job("report", *(word.replace("{run}", str(twice.folder)) for word in words))
    assert done.returncode == 2
    assert why in done.stderr
    assert "Traceback" not in done.stderr
    assert not (ROOT / "x.html").exists()
    assert not (ROOT / "report.html").exists()


def test_an_altered_record_is_not_drawn(twice: Run, tmp_path: Path) -> None:
    """A report on records that are not the published ones would be a lie: exit code 65, naming the file."""
    copy = Path(shutil.copytree(twice.folder, tmp_path / "copy"))
    records = copy / "artifacts/evaluation/arc_easy.base.jsonl"
    records.write_bytes(records.read_bytes().replace(b"Stexirk", b"Stexirc", 1))
    done = job("report", str(copy), "--output", str(tmp_path / "x.html"))
    assert done.returncode == 65
    assert "artifacts/evaluation/arc_easy.base.jsonl: is damaged" in done.stderr
    assert not (tmp_path / "x.html").exists()


def test_the_cards_code_loads_the_adapter(twice: Run) -> None:
    """Copied from the card and run: the adapter, the tokenizer, and answers as the records have them."""
    import torch

    content = (twice.folder / CARD).read_text(encoding="utf-8")
    block = content.partition("```python\n")[2].partition("```")[0]
    names: dict[str, Any] = {}
    base = twice.results["settings"]["model.id"]["value"]
    own = block.replace("path/to/adapter", str(twice.folder / "artifacts/adapter")).replace("path/to/base", base)
    exec(own, names)  # what a user does
    model, tokenizer = names["model"], names["tokenizer"]
    records = _records(twice, "adapter")[:5]
    assert len(records) == 5
    for record in records:
        said = [f"{record['question']} {choice}" for choice in record["choices"]]
        likelihoods = []
        for text in said:
            ids, start = tokenizer(text).input_ids, len(tokenizer(record["question"]).input_ids)
            with torch.no_grad():
                scores = model(torch.tensor([ids])).logits[0, start - 1 : -1].float().log_softmax(-1)
            likelihoods.append(float(scores.gather(1, torch.tensor(ids[start:])[:, None]).sum()))
        assert likelihoods.index(max(likelihoods)) == record["prediction"]


def test_the_card_is_the_hubs(twice: Run) -> None:
    """The hub's library reads the published file; the demo's paths are no hub ids, and no licence is made up."""
    from huggingface_hub import ModelCard

    card = ModelCard.load(twice.folder / CARD)
    assert card.data.library_name == "peft"
    assert (card.data.base_model, card.data.datasets, card.data.license) == (None, None, None)
    accuracy = next(result for result in card.data.eval_results or [] if result.metric_type == "accuracy")
    assert accuracy.metric_value == round(twice.results["evaluation"]["tasks"]["arc_easy"]["adapter"]["acc"], 4)
    assert "preempted-twice" not in card.content
