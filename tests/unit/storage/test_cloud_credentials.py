"""Where Google's and Azure's credentials come from, and the errors if there are none."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import rsa

from job.errors import AccessDenied, JobError, SettingsError, Unreachable
from job.storage.azure_connection_string import azure_variables
from job.storage.credential_variables import check_variables, given, is_given
from tests.s3_server import Request, server
from tests.unit.storage.test_gcs_azure import answering, opened

CONNECTION = "AZURE_STORAGE_CONNECTION_STRING"
TOKEN = {"access_token": "given", "token_type": "Bearer", "expires_in": 3600, "expires_on": "4000000000"}


@pytest.fixture
def variables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Mapping[str, str]:
    """What the values of variables are made of: files with credentials."""
    key = rsa.generate_private_key(65537, 2048).private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    account = {"type": "service_account", "private_key": key.decode(), "private_key_id": "1", "client_email": "a@b.c"}
    files = {"account": json.dumps(account), "federated": "of the cluster", "external": '{"type": "external_account"}'}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    return {name: str(tmp_path / name) for name in files}


@pytest.mark.parametrize(
    ("scheme", "given", "proof"),
    [
        ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "{account}"}, "Bearer ey"),
        ("gs", {"GCE_METADATA_HOST": "{host}"}, "Bearer given"),  # GKE's workload identity has the same service
        ("gs", {"GOOGLE_BEARER_TOKEN": "given"}, "Bearer given"),
        ("az", {"AZURE_STORAGE_ACCOUNT_KEY": "QUFB"}, "SharedKey acct:"),
        ("az", {"AZURE_STORAGE_SAS_TOKEN": "?sv=1&sig=given"}, "/bucket/run/a?sv=1&sig=given"),
        (
            "az",
            {
                "AZURE_CLIENT_ID": "c",
                "AZURE_TENANT_ID": "t",
                "AZURE_FEDERATED_TOKEN_FILE": "{federated}",
                "AZURE_AUTHORITY_HOST": "{url}",
            },
            "Bearer given",
        ),
        (
            "az",
            {
                "AZURE_CLIENT_ID": "c",
                "AZURE_TENANT_ID": "t",
                "AZURE_CLIENT_SECRET": "s",
                "AZURE_AUTHORITY_HOST": "{url}",
            },
            "Bearer given",
        ),
        ("az", {"AZURE_CLIENT_ID": "c", "AZURE_MSI_ENDPOINT": "{url}/oauth2/token"}, "Bearer given"),
        ("az", {CONNECTION: "AccountName=acct;AccountKey=QUFB;BlobEndpoint={url}/"}, "SharedKey acct:"),
        ("az", {CONNECTION: "BlobEndpoint={url};AccountName=acct;SharedAccessSignature=sv=1&sig=given"}, "sig=given"),
    ],
)
def test_every_kind_of_credentials(
    monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str], scheme: str, given: dict[str, str], proof: str
) -> None:
    """By each of the clouds' own variables, files and services a request is proved."""
    asked: list[tuple[str, str]] = []

    def answer(request: Request) -> None:
        if "token" in request.path:
            request.answer(200, json.dumps({**TOKEN, "resource": "x"}).encode(), Content_Type="application/json")
        else:
            asked.append((request.headers.get("Authorization", ""), request.path))
            request.refuse(404, "NoSuchKey" if scheme == "gs" else "BlobNotFound")

    with server(answer) as url:
        values = {**variables, "url": url, "host": url.partition("//")[2]}
        environ = {name: value.format(**values) for name, value in given.items()}
        if scheme == "gs":
            environ["GOOGLE_BASE_URL"] = url
        elif CONNECTION not in given:
            environ |= {"AZURE_STORAGE_ENDPOINT": url, "AZURE_STORAGE_ACCOUNT_NAME": "acct"}
        for name, value in {**environ, **azure_variables(environ)}.items():
            monkeypatch.setenv(name, value)
        assert opened(scheme).read("a") is None
    assert any(proof in part for part in asked[0]), asked


@pytest.mark.parametrize("name", ["a;b", "a=b", "a/b", "a b", "AccountName=a;AccountKey=QUFB"])
def test_what_is_no_name_of_an_account(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """It is refused, without its text; where no store of Azure is used, it is not looked at; a line end is no part."""
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", name)
    with pytest.raises(SettingsError, match="AZURE_STORAGE_ACCOUNT_NAME: is no name of a storage account") as caught:
        check_variables("az")
    assert name not in str(caught.value)
    for scheme in ("gs", "s3"):
        check_variables(scheme)
    monkeypatch.setenv("AZURE_STORAGE_ACCOUNT_NAME", " acct\n")
    check_variables("az")


def test_every_variable_with_a_secret_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """In one error, so that all of them can be put right at once."""
    names = ("AZURE_FEDERATED_TOKEN_FILE", "AZURE_STORAGE_ENDPOINT", "AZURE_AUTHORITY_HOST")
    values = ("-----BEGIN PRIVATE KEY-----", "https://host/?sig=hunter2", "https://host/?sig=hunter2")
    for name, value in zip(names, values, strict=True):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("GOOGLE_BASE_URL", "https://host/?sig=hunter2")
    for scheme, named in (("az", names), ("gs", ("GOOGLE_BASE_URL",))):
        with pytest.raises(SettingsError) as caught:
            check_variables(scheme)
        assert tuple(problem.where for problem in caught.value.problems) == named
        assert "hunter2" not in str(caught.value)


def test_which_variables_a_message_names(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those that are set; all of them where none is; an empty one is not set."""
    for name, value in (("QLORA_A", "x"), ("QLORA_B", ""), ("QLORA_C", "y")):
        monkeypatch.setenv(name, value)
    assert [is_given(name) for name in ("QLORA_A", "QLORA_B", "QLORA_D")] == [True, False, False]
    assert given("QLORA_A", "QLORA_B", "QLORA_C") == "QLORA_A or QLORA_C"
    assert given("QLORA_B", "QLORA_D") == "QLORA_B or QLORA_D"


def test_a_renewed_token_is_read_anew(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """AKS writes a new federated token every hour: where an access token ends, the file is read again."""
    shown: list[bytes] = []

    def answer(request: Request) -> None:
        if "token" not in request.path:
            return request.refuse(404, "BlobNotFound")
        shown.append(request.content)
        return request.answer(200, json.dumps({**TOKEN, "expires_in": 1}).encode(), Content_Type="application/json")

    with server(answer) as url:
        environ = {
            "AZURE_STORAGE_ENDPOINT": url,
            "AZURE_STORAGE_ACCOUNT_NAME": "acct",
            "AZURE_CLIENT_ID": "c",
            "AZURE_TENANT_ID": "t",
            "AZURE_FEDERATED_TOKEN_FILE": str(tmp_path / "token"),
            "AZURE_AUTHORITY_HOST": url,
        }
        for name, value in environ.items():
            monkeypatch.setenv(name, value)
        store = opened("az")
        for token in ("first", "second"):
            (tmp_path / "token").write_text(token)
            assert store.read("a") is None
            time.sleep(0.2)  # for so long obstore takes even a token that has ended
    assert (b"=first" in shown[0], b"=second" in shown[-1]) == (True, True)


def test_connection_strings() -> None:
    """A connection string names account, cloud and credentials; an account that is named beside it is the one."""
    text = "DefaultEndpointsProtocol=https;AccountName=a;AccountKey=QUFB==;EndpointSuffix=core.chinacloudapi.cn;"
    assert azure_variables({CONNECTION: text}) == {
        "AZURE_STORAGE_ACCOUNT_NAME": "a",
        "AZURE_STORAGE_ENDPOINT": "https://a.blob.core.chinacloudapi.cn",
        "AZURE_STORAGE_ACCOUNT_KEY": "QUFB==",
    }
    signed = "BlobEndpoint=https://a.blob.core.windows.net/;SharedAccessSignature=?sv=1&sig=a%3D"
    assert azure_variables({CONNECTION: signed}) == {
        "AZURE_STORAGE_ACCOUNT_NAME": "a",
        "AZURE_STORAGE_ENDPOINT": "https://a.blob.core.windows.net",
        "AZURE_STORAGE_SAS_TOKEN": "sv=1&sig=a%3D",
    }
    for environ in ({}, {"AZURE_STORAGE_ACCOUNT_NAME": "b"}):
        assert azure_variables({**environ, CONNECTION: text if environ else "nonsense"}) == {}
    private = {"AZURE_STORAGE_ENDPOINT": "https://a.privatelink.example", "AZURE_STORAGE_ACCOUNT_KEY": "QkJC"}
    assert azure_variables({**private, CONNECTION: text}) == {"AZURE_STORAGE_ACCOUNT_NAME": "a"}
    assert azure_variables({CONNECTION: "accountname=a;ACCOUNTKEY=QUFB==;"})["AZURE_STORAGE_ACCOUNT_KEY"] == "QUFB=="


def test_other_files_of_google_are_named(monkeypatch: pytest.MonkeyPatch, variables: Mapping[str, str]) -> None:
    """A file of a federated identity, which obstore does not know, is denied, with the kinds that it knows."""
    monkeypatch.setenv("GOOGLE_APPLICATION_CREDENTIALS", variables["external"])
    with pytest.raises(AccessDenied, match=r"external_account.*service_account"):
        opened("gs")


@pytest.mark.parametrize(
    ("scheme", "variables", "error", "words"),
    [
        ("gs", {"GOOGLE_APPLICATION_CREDENTIALS": "/nowhere.json"}, AccessDenied, "/nowhere.json"),
        ("gs", {"GOOGLE_BEARER_TOKEN": "x", "GOOGLE_BASE_URL": "nonsense"}, SettingsError, "GOOGLE_BASE_URL"),
        ("gs", {"GOOGLE_BEARER_TOKEN": "a\nb", "GOOGLE_BASE_URL": "http://127.0.0.1:9"}, SettingsError, "credentials"),
        ("az", {}, SettingsError, "AZURE_STORAGE_ACCOUNT_NAME: is not set"),
        ("az", {"AZURE_STORAGE_ACCOUNT_NAME": "a", "AZURE_STORAGE_ACCOUNT_KEY": "?"}, AccessDenied, "Access Key"),
        (
            "az",
            {
                "AZURE_STORAGE_ACCOUNT_NAME": "a",
                "AZURE_CLIENT_ID": "c",
                "AZURE_TENANT_ID": "t",
                "AZURE_FEDERATED_TOKEN_FILE": "/nowhere",
            },
            AccessDenied,
            "federated token file",
        ),
        (
            "az",
            {
                "AZURE_STORAGE_ACCOUNT_NAME": "a",
                "AZURE_STORAGE_ENDPOINT": "ftp://user:hunter2@host",
                "AZURE_STORAGE_ACCOUNT_KEY": "QUFB",
            },
            SettingsError,
            "AZURE_STORAGE_ENDPOINT",
        ),
    ],
)
def test_the_clouds_own_variables(
    monkeypatch: pytest.MonkeyPatch, scheme: str, variables: dict[str, str], error: type[JobError], words: str
) -> None:
    """Missing or wrong credentials are named in the cloud's own words, with the code of denied access or settings."""
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(error, match=words) as caught:
        opened(scheme, timeout_seconds=20).read("a")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("status", [400, 403, 503])
def test_a_token_that_cannot_be_had(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, status: int) -> None:
    """Where the identity is refused a token, access is denied; where the service only fails, it is tried later."""
    (tmp_path / "token").write_text("federated")
    with server(lambda request: request.answer(status, b'{"error": "x"}')) as url:
        for name, value in {
            "AZURE_STORAGE_ACCOUNT_NAME": "a",
            "AZURE_CLIENT_ID": "c",
            "AZURE_TENANT_ID": "t",
            "AZURE_FEDERATED_TOKEN_FILE": str(tmp_path / "token"),
            "AZURE_AUTHORITY_HOST": url,
        }.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(Unreachable if status == 503 else AccessDenied, match="token request"):
            opened("az").read("a")


def test_a_signature_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A shared access signature, which is a part of the address, gets into no message."""
    with answering("az", lambda request: request.refuse(403, "AuthenticationFailed")):
        monkeypatch.delenv("AZURE_STORAGE_ACCOUNT_KEY")
        monkeypatch.setenv("AZURE_STORAGE_SAS_TOKEN", "sv=2023-11-03&sig=hunter2")
        store = opened("az")
        for attempt in (lambda: store.read("a"), lambda: list(store.list()), lambda: store.delete("a", if_tag="x")):
            with pytest.raises(AccessDenied) as caught:
                attempt()
            assert "hunter2" not in str(caught.value)
