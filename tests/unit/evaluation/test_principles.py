"""Answers are judged in pairs, in both orders; by judges in memory and on servers, which may misbehave."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import binomtest

from job.errors import AccessDenied, DataError, Preempted, SettingsError, Unreachable
from job.evaluation import judges
from job.evaluation.judges import MAX_BYTES, LocalJudge, ServedJudge, check_folder
from job.evaluation.principles import (
    parse_judgements,
    preference,
    question,
    read_principles,
    summarize,
    verdict_words,
    write_judgements,
)
from job.records import Judgement
from tests.helpers import make_base
from tests.judge_server import judge_server

KEY = "sk-not-to-be-shown"


def judged(said: str | None, count: int = 1) -> list[Judgement]:
    """Judgements by what was said in both orders, such as `BA`; None where nothing was asked."""
    letters = [None, None] if said is None else [None if letter == "-" else letter for letter in said]
    return [Judgement("p:1", said is None, letters[0], letters[1])] * count


@pytest.mark.parametrize(
    ("name", "text"),
    [("rules.yaml", "- Be  brief.\n- 'Be: kind.'\n- ''\n"), ("rules.txt", "\n Be brief.\nBe: kind.\n\n")],
)
def test_rules_of_a_file(tmp_path: Path, name: str, text: str) -> None:
    """A YAML list or a rule on each line gives the same rules."""
    path = tmp_path / name
    path.write_text(text)
    assert read_principles(path) == ("Be brief.", "Be: kind.")


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("missing.txt", None),
        ("empty.txt", b"\n \n"),
        ("bad.yaml", b"- [sesame"),
        ("map.yaml", b"sesame: 1"),
        ("numbers.yaml", b"- 1\n- sesame"),
        ("binary.txt", b"\xff\xfesesame"),
        ("many.txt", b"sesame\n" * 200),
        ("large.txt", b"sesame " * 200_000),
    ],
)
def test_what_holds_no_rules_is_refused(tmp_path: Path, name: str, data: bytes | None) -> None:
    """The message names the setting and the file, and quotes nothing of it."""
    path = tmp_path / name
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DataError, match="JOB_EVAL__PRINCIPLES") as caught:
        read_principles(path)
    assert "sesame" not in str(caught.value)


def test_a_position_is_no_preference() -> None:
    """Only what is said in both orders counts; one letter for both, silence, and equal answers are ties."""
    words = {
        "BA": "adapter",
        "AB": "base",
        "AA": "tie",
        "BB": "tie",
        "-A": "tie",
        "B-": "tie",
        "--": "tie",
        None: "tie",
    }
    assert {said: preference(judged(said)[0]) for said in words} == words


def test_figures_are_those_of_scipy() -> None:
    """The sign test over the preferences, Wilson's interval, and each kind of tie counted."""
    found = [*judged("BA", 9), *judged("AB", 1), *judged("AA", 3), *judged("B-", 2), *judged(None, 4)]
    figures = summarize(found)
    reference = binomtest(9, 10)
    assert figures["p"] == pytest.approx(float(reference.pvalue))
    assert figures["ci95"] == pytest.approx(list(reference.proportion_ci(method="wilson")))
    counts = {name: figures[name] for name in ("n", "adapter", "base", "ties", "same", "inconsistent", "undecided")}
    assert counts == {"n": 19, "adapter": 9, "base": 1, "ties": 9, "same": 4, "inconsistent": 3, "undecided": 2}
    assert verdict_words(figures) == "adapter preferred"
    assert verdict_words(summarize([*judged("AB", 9), *judged("BA", 1)])) == "base preferred"
    assert verdict_words(summarize(judged("BA", 5))) == "inconclusive"
    only_ties = summarize(judged("AA", 3))
    assert (only_ties["p"], only_ties["share"], only_ties["ci95"]) == (None, None, None)


def test_judgements_are_read_as_they_were_written(tmp_path: Path) -> None:
    """A file of lines gives back the same judgements; another form is refused."""
    found = [*judged("BA"), *judged("A-"), *judged(None)]
    write_judgements(tmp_path / "j.jsonl", found)
    assert parse_judgements((tmp_path / "j.jsonl").read_bytes()) == found
    with pytest.raises(ValueError, match="base_first"):
        parse_judgements(b'{"where": "p:1", "same": false, "base_first": 3, "adapter_first": null}\n')


def test_a_model_in_memory_judges(tmp_path: Path) -> None:
    """It says the letter of the higher logit, the same each time; a question that is too long is not cut, but a tie."""
    make_base(tmp_path)
    judge = LocalJudge(tmp_path, torch.device("cpu"), torch.float32)
    texts = [question(["Be brief."], "Why?", "x" * n, "y") for n in range(1, 40, 4)]
    said = [judge.choose(text, lambda: None) for text in texts]
    assert set(said) <= {"A", "B"}
    assert said == [judge.choose(text, lambda: None) for text in texts]
    ids = judge._reads.tokenizer.encode(f"{texts[0]}\nAnswer:")
    logits = judge._model(torch.tensor([ids])).logits[0, -1]
    letters = [judge._reads.tokenizer.encode(f" {x}", add_special_tokens=False)[-1] for x in "AB"]
    assert said[0] == ("A" if logits[letters[0]] >= logits[letters[1]] else "B")
    judge._longest = len(ids) - 1
    assert judge.choose(texts[0], lambda: None) is None


def served(url: str, seconds: float = 5.0) -> ServedJudge:
    """A judge on a server of this machine."""
    return ServedJudge(url, "a-judge", KEY, seconds=seconds, pause=0.01)


@pytest.mark.parametrize(
    ("reply", "choice"),
    [("A", "A"), ("**B**", "B"), ("Answer: b.", "B"), ("A better one is B", None), ("", None), ("Neither", None)],
)
def test_a_server_is_asked(reply: str, choice: str | None) -> None:
    """One request with model and key; only a reply that begins with a letter alone counts."""
    with judge_server(lambda _: reply) as server:
        assert served(f"{server.url}/v1").choose("which?", lambda: None) == choice
        assert [one["model"] for one in server.asked] == ["a-judge"]
        assert server.keys == [f"Bearer {KEY}"]


def test_a_server_that_is_busy_is_asked_again() -> None:
    """Overload and errors of the server are repeated; in the end it is exit code 69, without the key."""
    with judge_server() as server:
        server.codes = [429, 503, 500]
        server.reply = lambda _: "B"
        assert served(server.url).choose("which?", lambda: None) == "B"
        assert len(server.asked) == 4
        server.codes = [503] * 9
        with pytest.raises(Unreachable) as caught:
            served(server.url).choose("which?", lambda: None)
        assert KEY not in str(caught.value)
    with pytest.raises(Unreachable):
        served(server.url).choose("which?", lambda: None)


@pytest.mark.parametrize(
    ("code", "error"), [(401, AccessDenied), (403, AccessDenied), (404, SettingsError), (307, SettingsError)]
)
def test_a_refusal_is_not_repeated(code: int, error: type[Exception]) -> None:
    """A wrong key, a wrong name, and a redirect, which would give the key to another server, end the run at once."""
    with judge_server(lambda _: "A") as server:
        server.codes = [code] * 9
        server.body = KEY.encode()
        with pytest.raises(error) as caught:
            served(server.url).choose("which?", lambda: None)
        assert len(server.asked) == 1
        assert KEY not in str(caught.value)


@pytest.mark.parametrize("code", [400, 413, 422])
def test_a_question_that_is_too_long_is_not_judged(code: int) -> None:
    """Where the server takes a tiny question, one that it refuses is a tie; where it takes none, the run ends."""
    with judge_server(lambda _: "A") as server:
        server.codes = [code]
        assert served(server.url).choose("which?", lambda: None) is None
        assert len(server.asked) == 2
        served(server.url).check(lambda: None)
        server.codes = [code] * 2
        with pytest.raises(SettingsError, match="JOB_EVAL__JUDGE_MODEL"):
            served(server.url).choose("which?", lambda: None)


def test_a_busy_server_says_how_long_to_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Retry-After is heeded, up to a minute; a date in it is not."""
    waited: list[float] = []
    monkeypatch.setattr(judges, "_wait", lambda seconds, _check_stop: waited.append(seconds))
    with judge_server(lambda _: "A") as server:
        for said in ("7", "4000", "Wed, 21 Oct 2026 07:28:00 GMT"):
            server.codes, server.retry_after = [429], said
            assert ServedJudge(server.url, "a-judge", KEY, pause=9.0).choose("which?", lambda: None) == "A"
    assert [seconds for seconds in waited if seconds > 1] == [7.0, 60.0, 9.0]


def test_a_local_judge_is_checked_before_training(tmp_path: Path) -> None:
    """Letters that are one token, a broken chat template and missing weights are found without loading weights."""
    make_base(tmp_path)
    check_folder(tmp_path)
    template = tmp_path / "chat_template.jinja"
    template.write_text("{{ raise_exception('no') }}")
    with pytest.raises(DataError, match=r"JOB_EVAL__JUDGE.*chat template"):
        check_folder(tmp_path)
    template.unlink()
    weights = load_file(tmp_path / "model.safetensors")
    save_file(dict(list(weights.items())[:1]), tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(DataError, match="JOB_EVAL__JUDGE"):
        check_folder(tmp_path)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    tokenizer = json.loads((tmp_path / "tokenizer.json").read_text())
    tokenizer["normalizer"] = {"type": "Replace", "pattern": {"String": "B"}, "content": "A"}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(SettingsError, match="does not distinguish A from B"):
        check_folder(tmp_path)


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b'{"choices": []}', b'{"choices": [{"message": {"content": 3}}]}', b"[" * 100_000]
)
def test_an_answer_that_is_none_is_an_error(body: bytes) -> None:
    """What is not of OpenAI's form is never taken for a tie."""
    with judge_server(lambda _: "A") as server:
        server.body = body
        with pytest.raises(Unreachable, match="not one of OpenAI's API"):
            served(server.url).choose("which?", lambda: None)


def test_answers_are_bounded_in_size_and_time() -> None:
    """A reply without end, and one that comes byte by byte, end with 69; a request to stop is heeded meanwhile."""
    with judge_server(lambda _: "A") as server:
        server.body = b" " * (MAX_BYTES + 1)
        with pytest.raises(Unreachable, match="more than"):
            served(server.url).choose("which?", lambda: None)
        server.body, server.drip = None, 0.05
        with pytest.raises(Unreachable, match=r"within 0\.2 s"):
            served(server.url, 0.2).choose("which?", lambda: None)

        def stop() -> None:
            raise Preempted("stopped")

        with pytest.raises(Preempted):
            served(server.url, 60.0).choose("which?", stop)
