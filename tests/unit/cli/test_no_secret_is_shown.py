"""Secrets in an address or file name are refused with the fix, and are in no output and no file."""

from __future__ import annotations

import base64
import json
from pathlib import Path

import pytest

from job.cli.main import main
from job.common.hashing import sealed, unsealed
from job.common.secrets_in_text import is_key, secret_in, shown, signatures_in
from job.errors import MAX_SHOWN, SettingsError, environment_name
from job.log import scrub
from job.results.promotion import pointer_location, promote
from job.results.reader import open_run, read_published
from job.settings.load import load_settings, secrets
from job.settings.schema import NAMES
from job.storage.location import Location, StorageOptions
from job.storage.open import open_store
from tests.published_run import pairs, publish_run

SECRET = "hunter2Hunter2Hunter2"
SIGNED = {
    "azure": f"az://bucket/runs/a?sv=2023-11-03&sig={SECRET}",
    "azure-https": f"https://acct.blob.core.windows.net/c/x?SIG={SECRET}&sv=1",
    "s3": f"s3://bucket/runs/a?X-Amz-Expires=60&X-Amz-Signature={SECRET}",
    "s3-https": f"https://bucket.s3.amazonaws.com/a?X-Amz-Security-Token={SECRET}",
    "s3-old": f"https://bucket.s3.amazonaws.com/a?AWSAccessKeyId=A&Signature={SECRET}",
    "google": f"gs://bucket/runs/a?X-Goog-Signature={SECRET}",
    "encoded": f"az://bucket/runs/a%3Fsv%3D1%26sig%3D{SECRET}",
    "encoded-twice": f"az://bucket/runs/a%253Fsig%253D{SECRET}",
    "no-question-mark": f"az://bucket/runs/a&sig={SECRET}",
    "mistyped": f"az:/bucket/runs/a?sig={SECRET}",
    "no-scheme": f"acct.blob.core.windows.net/c/x?sv=1&sig={SECRET}",
    "login": f"s3://AKIA:{SECRET}@bucket/runs/a",
}
KEY = f"-----BEGIN PRIVATE KEY-----\n{SECRET}\n-----END PRIVATE KEY-----\n"
ACCOUNT = json.dumps({"type": "service_account", "private_key": KEY, "private_key_id": "1", "client_email": "a@b.c"})
TOKEN = f"eyJhbGciOiJSUzI1NiJ9.{SECRET}.{SECRET}"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder, and a platform that takes the reason of a failure in a file there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("JOB_LOG__FORMAT", "json")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("KUBERNETES_TERMINATION_LOG", str(tmp_path / "termination.log"))


def refused(capsys: pytest.CaptureFixture[str], words: list[str]) -> list[str]:
    """The problems with which a command ends, after a look for the secret in all that it printed and wrote."""
    assert main(words) == 2
    printed = capsys.readouterr()
    written = [path.read_text() for path in Path.cwd().rglob("*") if path.is_file()]
    assert [path.name for path in Path.cwd().iterdir()] == ["termination.log"]
    assert SECRET not in "".join([printed.out, printed.err, *written])
    problems: list[str] = json.loads(printed.err)["problems"]
    return problems


@pytest.mark.parametrize("address", [SIGNED["azure"], SIGNED["s3-https"], SIGNED["login"]])
@pytest.mark.parametrize(
    ("typed", "where"),
    [
        ("status {}", ""),
        ("verify {} --format json", ""),
        ("report {}", ""),
        ("compare run {}", ""),
        ("compare --history {}", ""),
        ("status run {}", ""),  # one argument too many
        ("promote {} --to pointer", ""),
        ("promote run --to {}", "--to"),
        ("promote --rollback --to={}", "--to"),
        ("push run --hub {}", "--hub"),
        ("push run --oci {}", "--oci"),
        ("serve-check {}", ""),
        ("verify run --key {}", "--key"),
        ("export {} merged", "JOB_EXPORT__RUN (command line)"),
        ("config --data.source {}", "JOB_DATA__SOURCE (command line)"),
        ("plan --model.id={}", "JOB_MODEL__ID (command line)"),
        ("run --run.output {}", "JOB_RUN__OUTPUT (command line)"),
    ],
)
def test_an_address_with_a_secret(capsys: pytest.CaptureFixture[str], typed: str, where: str, address: str) -> None:
    """Every command that takes an address names it without the secret, or the setting or option that it is in."""
    problem = refused(capsys, typed.replace("{}", address).split())[0]
    assert problem.startswith(f"{where or shown(address)}: has a ")
    assert "which would be printed and published" in problem


@pytest.mark.parametrize("address", SIGNED.values(), ids=SIGNED)
def test_every_form_of_an_address(address: str) -> None:
    """No store is opened at one, however it is written."""
    with pytest.raises(SettingsError, match="which would be printed and published") as caught:
        open_store(address)
    assert SECRET not in str(caught.value)


def test_an_address_in_place_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """It is the first word, and so no command."""
    assert refused(capsys, [SIGNED["azure"]])[0].startswith("az://bucket/runs/a: is not a command")


@pytest.mark.parametrize("address", [*SIGNED.values(), ACCOUNT], ids=[*SIGNED, "key"])
def test_no_setting_takes_a_secret(address: str) -> None:
    """Whichever setting has it: it is refused, or kept as a secret, and not repeated."""
    kept = ("eval.judge_key", "sign.password", "notify.webhook")  # secrets as a whole
    values = {
        environment_name(name): f"arc_easy={address}" if name == "eval.data" else address
        for name in NAMES
        if name not in kept
    }
    for start in range(0, len(values), MAX_SHOWN):
        given = dict(list(values.items())[start : start + MAX_SHOWN])
        with pytest.raises(SettingsError) as caught:
            load_settings([], given)
        assert SECRET not in str(caught.value)
        assert {problem.where for problem in caught.value.problems} == {f"{name} (environment)" for name in given}


def test_a_webhook_may_have_a_signature() -> None:
    """As those of Power Automate have: it is a secret as a whole."""
    address = f"https://prod.logic.azure.com/workflows/1?sig={SECRET}"
    assert load_settings([], {"JOB_NOTIFY__WEBHOOK": address}).notify.webhook is not None


@pytest.mark.parametrize(
    "address",
    [
        "gs://bucket/part-?.jsonl",
        "s3://bucket/what?/sig=1/a.jsonl",
        "az://bucket/a?b=c&d",
        "s3://bucket/design=2?.jsonl",
        "s3://bucket/a:b@c",
        "rows-?[0-9].jsonl",
        "a.jsonl=2x,gs://bucket/b.jsonl,org/name@3f5c2a1",
    ],
)
def test_ordinary_names(address: str) -> None:
    """A question mark is a wildcard or a part of a name, and no secret."""
    assert secret_in(address) is None
    if "," not in address:
        assert str(Location.parse(address)) == address
        assert load_settings([f"--data.source={address}"], {}).data.source == address


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("az://bucket/a;sig=x", "has a signature"),
        ("az://bucket/a#sig=x", "has a signature"),
        ("https://host/a?SecurityToken=x", "has a signature"),
        ("S3://AKIA:secret@bucket/a", "has a login"),
        ("s3://AKIA:@bucket/a", "has a login"),
        ("s3://:secret@bucket/a", "has a login"),  # a password without a user
        ("s3://bucket and x:y@z", None),
        ("gs://bucket,a:b@c", None),
        ("http://me:secret@host", None),  # such settings have a check of their own
        ("https://me:secret@host", None),
        ("see s3://AKIA:se/cr:et@bucket/a", "has a login"),
        # The labels of RFC 7468, RFC 5915, OpenSSL and OpenSSH.
        *((f"-----BEGIN {kind}PRIVATE KEY-----", "holds a private key") for kind in ("", "RSA ", "EC ", "ENCRYPTED ")),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "holds a private key"),
        ('{"private_key": "x"}', "holds a private key"),
        ("-----BEGIN PUBLIC KEY-----", None),
        ("-----BEGIN CERTIFICATE-----", None),
        ("s3://bucket/a folder:b@c", None),
        ("s3://bucket/design=1?design=2", None),
    ],
)
def test_kinds_of_secrets(text: str, what: str | None) -> None:
    """Signatures behind any separator, logins of every scheme, private keys of every kind; public ones are none."""
    found = secret_in(text)
    assert found is None if what is None else found is not None and found.startswith(what)


@pytest.mark.parametrize("separator", ["?", "&", ";", "#", "%3F", "%3f", "%26", "%3B", "%23", "%253F", "%252526"])
def test_messages_show_what_is_before_the_query(separator: str) -> None:
    """Also where it is percent-encoded, once or more often; of a login only the place is left."""
    assert shown(f"https://host/a{separator}x={SECRET}") == "https://host/a"
    assert shown(f"s3://me@home:{SECRET}@bucket/a{separator}x") == "s3://bucket/a"


def test_signatures_in_a_text() -> None:
    """Each as it is written there, up to what ends it; an empty one would hide the whole text."""
    text = "az://b/a?sig=ab%2Fc&sv=1 and \"az://b/b?sig=de\", 'az://b/c?SIG=fg' or\taz://b/d?sig=hi\tnow ?sig="
    assert signatures_in(text) == ["ab%2Fc", "de", "fg", "hi"]


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"type": "authorized_user", "refresh_token": "x"}', True),
        (' \t{"type": "authorized_user"}', True),
        *((base64.b64encode(text).decode(), True) for text in (b'{"a": "of a key"}', b'{\n "a": "of a key"}')),
        (base64.b64encode(b'{\r\n "a": "of a key"}').decode(), True),
        (base64.b64encode(b'{"a?>?>?>?>?>?>?>?>?>": 1}').decode(), True),  # with + and /
        (f"eyJ{'a' * 20}", True),
        (f"eyJ{'a' * 19}", False),
        (f"MII{'a+/=' * 50}", True),
        (f"MII{'a+/=' * 49}", False),
        ("/" + "a" * 4095, False),  # PATH_MAX of Linux
        ("/" + "a" * 4096, True),
        ("/run/secrets/key.json\n", False),  # as `echo` writes it to a file of variables
        ("first\nsecond", True),
    ],
)
def test_what_is_a_key(text: str, key: bool) -> None:  # noqa: FBT001
    """JSON, plain and in base64 with every kind of line end, a key in DER, several lines, and more than a path has."""
    assert is_key(text) == key


def test_the_query_of_an_unknown_address_is_not_repeated() -> None:
    """Other programs have other names for a secret."""
    with pytest.raises(SettingsError, match=r"^https://host/a: is neither s3://") as caught:
        Location.parse(f"https://host/a?access={SECRET}")
    assert SECRET not in str(caught.value)


def test_a_pointer_to_an_address_with_a_signature(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Earlier versions could write one; no command repeats what it names."""
    publish_run(tmp_path / "run", {"quiz": pairs(20, improved=8)}, settings=("--gate.min_delta=0.01",))
    location = pointer_location(str(tmp_path / "pointer"), StorageOptions())
    promote(location, read_published(open_run(str(tmp_path / "run"))))
    facts = unsealed((tmp_path / "pointer").read_bytes())
    (tmp_path / "pointer").write_bytes(sealed({**facts, "run": SIGNED["azure"]}))
    capsys.readouterr()
    for words in (["verify", "pointer"], ["report", "pointer"], ["promote", "--rollback", "--to", "pointer"]):
        assert main(words) == 4
        printed = capsys.readouterr()
        assert "has a signature in it" in printed.err
        assert SECRET not in printed.out + printed.err


GOOGLE = ("GOOGLE_APPLICATION_CREDENTIALS", "GOOGLE_SERVICE_ACCOUNT", "GOOGLE_SERVICE_ACCOUNT_PATH")
FORMS = {
    "json": ACCOUNT,
    "pem": KEY,
    "base64": base64.b64encode(ACCOUNT.encode()).decode(),
    "lines": json.dumps(json.loads(ACCOUNT), indent=2),
    "token": TOKEN,
}


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize(
    ("scheme", "variable"),
    [
        *(("gs", variable) for variable in GOOGLE),
        ("az", "AZURE_FEDERATED_TOKEN_FILE"),
        ("s3", "AWS_WEB_IDENTITY_TOKEN_FILE"),
        ("s3", "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE"),
        ("s3", "AWS_SHARED_CREDENTIALS_FILE"),
        ("s3", "AWS_CONFIG_FILE"),
    ],
)
def test_a_key_in_place_of_its_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], scheme: str, variable: str, form: str
) -> None:
    """Refused before a request, with the variable and the fix; the log hides the key, whatever prints it."""
    monkeypatch.setenv(variable, form)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", "acct")
    (problem,) = refused(capsys, ["status", f"{scheme}://bucket/out/ref"])
    assert problem.startswith(f"{variable}: holds the key itself, but has to name its file; write it to a file")
    assert ("GOOGLE_SERVICE_ACCOUNT_KEY" in problem) == (scheme == "gs")
    assert SECRET not in scrub(f"quoted: {form}", secrets())
    with pytest.raises(SettingsError, match=f"^{variable}: "):
        open_store(f"{scheme}://other/x")


def test_a_key_in_the_variable_of_another_cloud(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It is not looked at where no store of that cloud is used."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", ACCOUNT)
    assert open_store(str(tmp_path)).tag("a") is None


@pytest.mark.parametrize(
    "path", ["/run/secrets/key.json", "key.json", "~/.config/gcloud/a b.json", "C:\\keys\\key.json", ""]
)
def test_paths_are_no_keys(path: str) -> None:
    """What names a file is used as it is."""
    assert not is_key(path)


def quoting(tmp_path: Path) -> dict[str, tuple[str, dict[str, str], str]]:
    """The values that obstore repeats in errors: (scheme, variables, words of the message)."""
    texts = {"kind": f'{{"type": "{SECRET}"}}', "text": f'"{SECRET}"', "pem": ACCOUNT}
    for name, text in texts.items():
        (tmp_path / f"{name}.json").write_text(text)
    given = "GOOGLE_APPLICATION_CREDENTIALS"
    account = {"AZURE_STORAGE_ACCOUNT_NAME": "acct", "AZURE_STORAGE_ACCOUNT_KEY": "QUFB"}
    return {
        "kind": ("gs", {given: str(tmp_path / "kind.json")}, "unknown variant `...`, expected `service_account` or"),
        "text": ("gs", {given: str(tmp_path / "text.json")}, 'invalid type: string "...", expected'),
        "long": ("gs", {given: f"{'/x' * 100}/{SECRET}"}, "Unable to open service account file: No such file"),
        "address": (
            "az",
            {**account, "AZURE_STORAGE_ENDPOINT": f"a;Key={SECRET}"},
            "AZURE_STORAGE_ENDPOINT: is not an",
        ),
        "query": ("az", {**account, "AZURE_STORAGE_ENDPOINT": f"http://h/?sig={SECRET}"}, "ENDPOINT: has a signature"),
        "account": (
            "az",
            {"AZURE_STORAGE_ACCOUNT_NAME": f"AccountKey={SECRET}"},
            "ACCOUNT_NAME: is no name of a storage",
        ),
        "string": ("az", {"AZURE_STORAGE_CONNECTION_STRING": SECRET}, "CONNECTION_STRING: names no storage account"),
        "emulator": ("az", {"AZURE_STORAGE_CONNECTION_STRING": "UseDevelopmentStorage=true"}, "is no valid connection"),
    }


@pytest.mark.parametrize("case", ["kind", "text", "long", "address", "query", "account", "string", "emulator"])
def test_what_obstore_repeats(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, case: str
) -> None:
    """The text of the client library is passed on without the values that it repeats."""
    scheme, variables, words = quoting(tmp_path)[case]
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert main(["status", f"{scheme}://bucket/out/ref"]) in {2, 77}
    printed = capsys.readouterr().err
    assert words in printed.replace('\\"', '"')
    assert SECRET not in printed


@pytest.mark.parametrize("variable", [*GOOGLE, "GOOGLE_SERVICE_ACCOUNT_KEY"])
@pytest.mark.parametrize("key", [KEY, SECRET, KEY.replace(SECRET, "!")])
def test_a_private_key_that_is_damaged(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path, variable: str, key: str
) -> None:
    """The variable is named, once, and not the place, which is not at fault."""
    text = json.dumps({**json.loads(ACCOUNT), "private_key": key})
    (tmp_path / "key.json").write_text(text)
    monkeypatch.setenv(variable, text if variable.endswith("_KEY") else str(tmp_path / "key.json"))
    assert main(["status", "gs://bucket/out/ref"]) == 2
    (problem,) = json.loads(capsys.readouterr().err)["problems"]
    assert problem.startswith(f"{variable}: the private key of the service account cannot be read; ")
    assert SECRET not in problem
