"""The documents agree with the code."""

from __future__ import annotations

import json
import re
import tomllib
from datetime import datetime
from pathlib import Path

import pytest

from job.cli.arguments import COMMANDS
from job.cli.help_text import usage
from job.data.formats import Row
from job.data.schemas import SCHEMAS, SFT_SCHEMAS, check_row, detect_schema
from job.errors import environment_name, exit_codes
from job.evaluation.statistics import mcnemar, tango_interval, verdict
from job.settings.load import describe, load_settings
from job.settings.schema import NAMES

ROOT = Path(__file__).parents[1]
CONTRIBUTING = (ROOT / ".github/CONTRIBUTING.md").read_text(encoding="utf-8")
DECISIONS = sorted((ROOT / ".github/decisions").glob("0*.md"))
PAGES = [ROOT / "README.md", ROOT / ".github/CONTRIBUTING.md", *DECISIONS]
README = (ROOT / "README.md").read_text(encoding="utf-8")
DOCKER = (ROOT / "infra/docker/README.md").read_text(encoding="utf-8")
BENCH = (ROOT / "tests/bench/README.md").read_text(encoding="utf-8")
RESULTS = ROOT / "tests/bench/results"
GUIDES = sorted(
    path
    for pattern in ("README.md", "infra/*/README.md", "job/*/README.md", "tests/bench/README.md")
    for path in ROOT.glob(pattern)
)
"""The pages for users."""


def test_exit_codes_in_the_readme() -> None:
    """The README's table of exit codes is that of `errors.py`."""
    section = README.partition("## Exit codes")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d+) \| (.+?) \| (.*?) ?\| .*\|$", section, re.MULTILINE)
    expected = [("0", "done, manifest published", "")]
    expected += [(str(code), meaning, retry) for code, (meaning, retry) in exit_codes().items()]
    assert rows == expected


def test_the_published_claim() -> None:
    """The table of discordances is what our statistics say, and its middle is where the verdict turns."""
    asked = 2376
    before, after = 1896, 1929
    assert [k for k in range(asked) if f"{100 * k / asked:.2f}" in {"79.80", "81.19"}] == [before, after]
    found = re.findall(r"^\| (\d+) \| (\d+) \| (.+?) % \| (.+?) \| (.+?) \| (\w+) \|$", BENCH, re.MULTILINE)
    pairs = [(int(better), int(worse)) for better, worse, *_ in found]
    expected = []
    for better, worse in pairs:
        assert better - worse == after - before
        assert worse <= asked - after
        p, (low, high) = mcnemar(better, worse), tango_interval(better, worse, asked)
        share, interval = f"{100 * (better + worse) / asked:.1f}", f"{100 * low:+.2f} to {100 * high:+.2f}"
        expected.append((str(better), str(worse), share, f"{p:.4g}", interval, verdict(p, (low, high))))
    assert found == expected
    last = max(better + worse for (better, worse), row in zip(pairs, found, strict=True) if row[-1] == "improved")
    assert f"Up to {last} changed answers, {100 * last / asked:.1f} % of the questions" in BENCH
    assert (last + 2) in {better + worse for better, worse in pairs}  # the next one there can be is none


def test_settings_in_the_documents() -> None:
    """Every `JOB_` name in the pages for users, and in Docker's files, is a setting."""
    known = {environment_name(name) for name in NAMES} | {"JOB_CONFIG", "JOB_SECRETS_DIR"}
    texts = [path.read_text(encoding="utf-8") for path in [*GUIDES, *(ROOT / "infra/docker").glob("*.yaml")]]
    assert {name for text in texts for name in re.findall(r"JOB_[A-Z_]+[A-Z]", text)} <= known


def test_the_defaults_in_the_readme() -> None:
    """The README's table of the settings used most has the defaults that a run without settings has."""
    rows = re.findall(r"^\| `(JOB_\w+)` \| (\S+) \| .+ \|$", README.partition("## Settings")[2], re.MULTILINE)
    values = {environment_name(name): value for name, value, _ in describe(load_settings([], {}))}
    shown = {"JOB_RUN__ID": "generated"}
    assert len(rows) >= 15
    for variable, default in rows:
        value = values[variable]
        text = "none" if value is None else ",".join(value) if isinstance(value, list) else format(value)
        assert default == shown.get(variable, text.removesuffix(".0")), variable


def test_the_rows_in_the_readme_fit_their_schema() -> None:
    """Each example of a row is valid, and detected as the schema beside it."""
    rows = re.findall(r"^\| `(\w+)` \| `(\{.+\})` \| .+ \|$", README, re.MULTILINE)
    assert {schema for schema, _ in rows} == set(SCHEMAS)
    for schema, text in rows:
        fields = json.loads(text)
        among = SFT_SCHEMAS if schema in SFT_SCHEMAS else [schema]
        assert detect_schema(fields, among) == schema
        assert check_row(Row("README", fields), schema) == []


def test_the_commands_for_docker() -> None:
    """Docker waits longer than the job's grace; the secrets by file that are named are those the entrypoint reads."""
    patience = re.findall(r"--stop-timeout (\d+)", README + DOCKER)
    assert patience
    assert all(int(seconds) > load_settings([], {}).run.grace_seconds for seconds in patience)
    block = (ROOT / "entrypoint.sh").read_text(encoding="utf-8").split("secrets=(")[1].split(")")[0]
    (told,) = re.findall(r"\*\*Secrets\*\*(.*?)\n- ", DOCKER, re.DOTALL)
    assert set(block.split()) <= set(re.findall(r"[A-Z_]{8,}", told.replace("_FILE", "")))


def test_the_image_s_words_are_in_the_documents() -> None:
    """The base that a build for old GPUs needs is pinned by digest like the default one."""
    dockerfile = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    for text in (dockerfile, DOCKER):
        assert re.search(
            r"BASE_IMAGE=nvidia/cuda:\d+\.\d+\.\d+-base-ubuntu24\.04@sha256:[0-9a-f]{64}$", text, re.MULTILINE
        )


def test_commands_in_the_usage() -> None:
    """`--help` names every command, but for SageMaker's own word for `run`."""
    assert all(f" {command}" in usage() or f"[{command}]" in usage() for command in COMMANDS if command != "train")


def named_paths(text: str) -> set[str]:
    """The paths that a document names in backticks, or links to."""
    quoted = re.findall(r"`((?:job|tests|infra|\.github|\.ci)/[\w./-]*)`", text)
    return {*quoted, *re.findall(r"\]\(((?:job|tests|infra|\.github)/[\w./-]+)\)", text)}


@pytest.mark.parametrize("path", PAGES, ids=lambda p: p.name)
def test_paths_in_the_documents(path: Path) -> None:
    """Every file and folder that README, CONTRIBUTING or a decision names is there."""
    missing = [name for name in named_paths(path.read_text(encoding="utf-8")) if not (ROOT / name).exists()]
    assert not missing
    assert path.name[:2] == "00" or named_paths(path.read_text(encoding="utf-8"))


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_links_of_the_guides(page: Path) -> None:
    """Every link of a page for users leads to a file or folder of the project, and its anchor to a heading there."""
    links = re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8"))
    wrong = []
    for link in links:
        if link.startswith("https://"):
            continue
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if not target.exists() or (anchor and anchor not in anchors_of(target)):
            wrong.append(link)
    assert not wrong


def test_every_guide_is_linked_from_the_readme() -> None:
    """A user finds every page from the README."""
    assert {path.relative_to(ROOT).as_posix() for path in GUIDES} - {"README.md"} <= set(
        re.findall(r"\]\(([\w./-]+)", README)
    )


@pytest.mark.parametrize("page", GUIDES, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_tables_of_the_guides(page: Path) -> None:
    """Every row of a table has as many cells as its first row; an empty line within would end the table."""
    tables = re.findall(r"(?:^\|.*\|\n)+", page.read_text(encoding="utf-8"), re.MULTILINE)
    for table in tables:
        rows = [len(re.sub(r"`[^`]*`", "", row).split("|")) for row in table.splitlines()]
        assert len(set(rows)) == 1, table
        assert re.fullmatch(r"[|:\- ]+", table.splitlines()[1]), f"not a table, its second line is no rule: {table}"


def test_where_to_change_what() -> None:
    """What CONTRIBUTING names as a name in a file is in that file."""
    named = re.findall(r"`(\w+)` in `(job/[\w/]+\.py)`", CONTRIBUTING)
    assert named
    for name, path in named:
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text(encoding="utf-8")), (name, path)


def test_the_table_of_packages() -> None:
    """CONTRIBUTING lists every package, and lets it import what its contract leaves and names."""
    rows = re.findall(r"^\| `(\w+)` \| .+ \| (.+) \|$", CONTRIBUTING, re.MULTILINE)
    packages = {path.parent.name for path in (ROOT / "job").glob("*/__init__.py")} - {"demo"}
    assert {name for name, _ in rows} == packages
    config = tomllib.loads((ROOT / ".github/imports.toml").read_text(encoding="utf-8"))["tool"]["importlinter"]
    contracts = {contract["id"]: contract for contract in config["contracts"]}
    assert packages - contracts.keys() == {"cli"}
    for name, allowed in rows:
        if name == "cli":
            assert allowed == "all"
            continue
        but, words = allowed.startswith("all but "), allowed.removeprefix("all but ").split()
        listed = set(words) - {"-"}
        forbidden = {module.removeprefix("job.") for module in contracts[name]["forbidden_modules"]}
        assert (packages - listed if but else listed) - {name} == packages - forbidden - {name}, name
        in_words = "no other package" if allowed == "-" else "all but " * but + ", ".join(words)
        assert contracts[name]["name"] == f"{name} imports {in_words}"


def test_decisions_are_short() -> None:
    """A decision is one short page, with its number in its first line."""
    for path in DECISIONS:
        text = path.read_text(encoding="utf-8")
        assert text.startswith(f"# {int(path.name[:4])}. ")
        assert len(text.splitlines()) <= 50


def test_every_decision_is_in_the_index() -> None:
    """The index has one line for each decision, in order, with a link to its page."""
    index = (ROOT / ".github/decisions/README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[(\d+)\]\((\S+)\) \| .+ \|$", index, re.MULTILINE) == [
        (str(int(path.name[:4])), path.name) for path in DECISIONS
    ]


def test_files_of_figures() -> None:
    """Every file of results and every script that a figure names is there, and a page or a source names every file."""
    sources = [*PAGES, *GUIDES, ROOT / "CHANGELOG.md", *(ROOT / "job").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    named = {
        name
        for path in sources
        for name in re.findall(r"\b(20\d\d-\d\d-\d\d-[\w-]+\.(?:jsonl?|txt))\b", path.read_text(encoding="utf-8"))
    }
    assert named == {path.name for path in RESULTS.iterdir()}
    scripts = re.findall(r"`(\w+\.py)", BENCH)
    assert scripts
    assert not [name for name in scripts if not (ROOT / "tests/bench" / name).exists()]


def test_the_figures_of_the_gpu() -> None:
    """README's table of figures, and the tables it is taken from, have the numbers of the files that they name."""
    (name,) = set(re.findall(r"`(\S+-bench-gpu\.json)`", README))
    found = json.loads((RESULTS / name).read_text(encoding="utf-8"))

    def last(what: str, key: str, **where: object) -> float:
        return [one[key] for one in found if one["what"] == what and all(one[k] == v for k, v in where.items())][-1]

    def best(what: str, key: str) -> float:
        return max(one[key] for one in found if one["what"] == what)

    rows = {row[0]: row[1:] for row in re.findall(r"^\| (.+?) \| (\S.*?) \| (.*?) \|", README, re.MULTILINE)}
    rate = f"{last('buyers', 'tokens_per_second', rows='alpaca'):,.0f}"
    trl = last("plain TRL", "tokens_per_second")
    alone = (RESULTS / "2026-11-30-h200-unsloth.jsonl").read_text(encoding="utf-8").splitlines()
    fastest = max(
        (one for one in map(json.loads, alone) if one["what"] == "unsloth"), key=lambda one: one["tokens_per_second"]
    )
    unsloth = fastest["tokens_per_second"]
    memory = f"{last('buyers', 'peak_gib', rows='alpaca'):.1f}"
    trl_memory, unsloth_memory = f"{last('plain TRL', 'peak_gib'):.1f}", f"{fastest['peak_gib']:.1f}"
    peers = f"{trl:.0f} plain TRL in {trl_memory} GiB; {unsloth:,.0f} Unsloth in {unsloth_memory} GiB"
    assert rows["training, target tokens a second, CUDA graphs captured"] == (f"{rate} in {memory} GiB", peers)
    scores = f"{last('score', 'questions_per_second'):,.0f}"
    peer = max((one for one in found if one["what"] == "HFLM"), key=lambda one: one["questions_per_second"])
    hflm, batch = f"{peer['questions_per_second']:.0f}", peer["batch_size"]
    assert rows["evaluation, ARC-Easy, questions a second"] == (scores, f"{hflm} lm-eval's HFLM, batches of {batch}")
    long = f"{last('long row', 'tokens_per_second', tokens=64000):,.0f}"
    assert rows["training on a row of 64,000 tokens, target tokens a second"][0] == long
    restart, first = (f"{last('restart', 'first_step_seconds', attempt=a):.1f}" for a in ("restarted", "killed"))
    what = "from a process's start to its next step, the demo after a kill, seconds"
    assert rows[what] == (restart, f"{first} the first start, which ran before it")
    job = "2026-11-30-h200-job.jsonl"
    what = "from a kill to the log's `resuming`, Mistral-7B's shape, seconds"
    assert rows[what][0] == f"{seconds_to_resume(job):.1f}"
    whole = [json.loads(line) for line in (RESULTS / job).read_text(encoding="utf-8").splitlines()]
    (killed,) = (one for one in whole if one["what"] == "exactness" and one["name"] == "killed")
    what = "the whole job, killed and restarted: files that differ"
    assert rows[what] == (f"{len(killed['differ'])} of {killed['artifacts']}", "an uninterrupted run")
    section = BENCH.partition("### On one GPU")[2].partition("\n### ")[0]
    assert all(f" {figure} " in section for figure in (rate, scores, hflm, long, restart))
    assert f"| {memory} | {trl_memory} | {unsloth_memory} |" in section
    differing = peer["questions"] - peer["same_predictions"]
    assert (
        f"| of HFLM's {peer['questions']} predictions, those that differ from this job's | | {differing} | |" in section
    )
    lines = [
        json.loads(line)
        for file in ("2026-11-30-h200-placement.jsonl", "2026-11-30-h200-long-rows.jsonl")
        for line in (RESULTS / file).read_text(encoding="utf-8").splitlines()
    ]
    for row, key, value in (
        (
            "a row of 343,000 tokens, one GPU limited to 80 GB, activations in main memory, target tokens a second",
            "what",
            "cap80",
        ),
        ("Llama-70B's shape on 80 GB, target tokens a second", "way", "70B, gpu, 80 GB"),
        ("the same on 24 GB, weights in main memory", "way", "70B, host, 24 GB"),
    ):
        measured = [line["tokens_per_second"] for line in lines if line.get(key) == value][-1]
        assert rows[row][0] == f"{measured:,.0f}"
        assert f"| {measured:,.0f}" in BENCH


def seconds_to_resume(name: str) -> float:
    """From the kill of a result file's run to `resuming` in its next attempt, by the log."""
    lines = [json.loads(line) for line in (RESULTS / name).read_text(encoding="utf-8").splitlines()]
    moments = {
        event: datetime.fromisoformat(f"2026-01-01T{when}+00:00")
        for line in lines
        if line["what"] == "attempt" and line["name"] == "killed"
        for when, event, _ in line["moments"]
    }
    return (moments["resuming"] - moments["JOB_FAULT fires"]).total_seconds()


def test_the_efficiency_of_two_gpus() -> None:
    """Every efficiency that was measured is in a table: against one GPU's speed, and against that with its share."""
    section = BENCH.partition("### Two GPUs")[2].partition("\n### ")[0]
    lines = (RESULTS / "2026-11-30-2xh200-processes.jsonl").read_text(encoding="utf-8").splitlines()
    found = [one for one in map(json.loads, lines) if one["what"] == "training"]
    assert found
    for batch in {one["batch"] for one in found}:
        runs = [one for one in found if one["batch"] == batch]
        shares = [one["efficiency_against_that"] for one in runs if "efficiency_against_that" in one]
        whole = ", ".join(f"{one['efficiency']:.3f}" for one in runs)
        assert re.search(rf"^\| .*\b{batch} rows in a step, .* \| {whole} \|$", section, re.MULTILINE), batch
        against = ", ".join(f"{share:.3f}" for share in shares)
        assert re.search(rf"^\| {batch} rows.*, {batch // 2} for each.* \| {against} \|$", section, re.MULTILINE), batch


def test_the_figures_of_the_cpu() -> None:
    """The table of what was measured on a CPU is what the named file of results has."""
    section = BENCH.partition("### On a CPU")[2].partition("\n### ")[0]
    (name,) = re.findall(r"`(\S+-cpu\.json)`\);", section)  # the table's; others are named below it
    results = json.loads((RESULTS / name).read_text(encoding="utf-8"))
    assert results["date"][:10] in section
    ratios = {row["what"]: row["ratio"] for row in results["rows"]}
    table = {
        what: cells
        for what, *cells in re.findall(r"^\| (.+?) \| (\S+) \| (\S+?)[, ].*? \| (\S+) \|$", section, re.MULTILINE)
    }
    seconds = {row["what"]: row["ours"].removesuffix(" s") for row in results["rows"]}
    commands = ("--help", "config", "a settings error")
    quick = re.search(
        r"^\| `--help`, `config`, a settings error, seconds of CPU time, best of 5 \| (.+?) \|", section, re.MULTILINE
    )
    assert quick is not None
    assert quick[1] == ", ".join(seconds[command] for command in commands)
    for what, row in {
        "training, NF4, target tokens a second": "training, NF4",
        "the same": "training, NF4, beside Unsloth",
        "evaluation, questions a second, same predictions": "evaluation",
        "from a restart to the next step on real data, seconds": "restart to the next new step, real data",
    }.items():
        ours, other, ratio = map(float, table[what])
        assert ratio == pytest.approx(ratios[row], abs=0.051)
        assert ours / other == pytest.approx(ratio, rel=0.03)
    quoted = re.findall(r"training (\S+) target tokens a second, TRL (\S+), Unsloth (\S+); evaluation (\S+) ", README)
    names = ("training, NF4, target tokens a second", "the same", "evaluation, questions a second, same predictions")
    (ours, trl, _), (_, unsloth, _), (scored, _, _) = (table[name] for name in names)
    assert quoted == [(ours, trl, unsloth, scored)]
