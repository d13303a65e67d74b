"""Signatures: made with a key, checked with its public half, by this job and by the library model-signing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519

from job.cli.promote import promote_command
from job.cli.push import push_command
from job.cli.serve_check import serve_check_command
from job.cli.verify import verify_command
from job.common.hashing import sealed
from job.errors import SettingsError, VerificationError
from job.planning.other_input_checks import check_other_inputs
from job.report.model_card import render_export_card, render_model_card
from job.results import signing
from job.settings.load import load_settings
from job.storage.local import LocalStore
from job.storage.location import StorageOptions
from job.verification.check_signature import signature_paths
from tests.published_run import forge, pairs, publish_file, publish_run, rewrite

WEIGHTS = "artifacts/adapter/adapter_model.safetensors"


def write_key(folder: Path, name: str, key: Any, password: bytes | None = None) -> tuple[str, str]:
    """A private key and its public half as files."""
    how: Any = serialization.BestAvailableEncryption(password) if password else serialization.NoEncryption()
    private, public = folder / f"{name}.pem", folder / f"{name}.pub"
    private.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, how))
    spki = serialization.PublicFormat.SubjectPublicKeyInfo
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.PEM, spki))
    return str(private), str(public)


def sign_run(run: Path, private: str) -> None:
    """Signs a run that is published already, as the last stage of the job does before it writes the manifest."""
    key, store = signing.load_private_key(private, None), LocalStore(run)
    results = json.loads((run / "results.json").read_bytes())
    results["artifacts"] = [one for one in results["artifacts"] if not one["path"].endswith("model.sig")]
    for folder in signing.signed_folders(results):
        signature = signing.sign(key, "adapter", signing.files_of(results, folder))
        artifact = publish_file(store, f"{folder}model.sig", signature)
        results["artifacts"].append(artifact.__dict__)
    pem = signing.public_key(key)
    results["signing"] = {
        "public_key": pem,
        "key_sha256": signing.key_id(pem),
        "signatures": signature_paths(results),
    }
    data = sealed(results)
    signature = signing.sign(key, run.name, signing.files_of_run(results, data), whole_run=True)
    (run / "model.sig").write_bytes(signature)
    (run / "results.json").write_bytes(data)


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, str]]:
    """The signer's key, and one of somebody else."""
    folder = tmp_path_factory.mktemp("keys")
    return {name: write_key(folder, name, ec.generate_private_key(ec.SECP256R1())) for name in ("signer", "other")}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, keys: dict[str, tuple[str, str]]) -> Path:
    """A signed run with an exported format."""
    quiz = [True] * 40
    run = publish_run(
        tmp_path_factory.mktemp("signed") / "run", {"quiz": pairs(40, improved=10)}, exported={"original": quiz}
    )
    sign_run(run, keys["signer"][0])
    return run


@pytest.fixture
def run(made: Path, tmp_path: Path) -> Path:
    """A copy that may be forged."""
    return Path(shutil.copytree(made, tmp_path / "run"))


def test_a_signed_run_verifies(
    made: Path, keys: dict[str, tuple[str, str]], capsys: pytest.CaptureFixture[str]
) -> None:
    """With the key of the signer; without it, it is said that anybody may have signed."""
    assert verify_command([str(made), "--key", keys["signer"][1]]) == 0
    assert "note" not in capsys.readouterr().out
    assert verify_command([str(made)]) == 0
    assert "use --key with the signer's key" in capsys.readouterr().out


@pytest.mark.parametrize("command", [push_command, serve_check_command])
def test_what_hands_a_run_on_takes_the_key_too(
    command: Callable[[list[str]], int], made: Path, keys: dict[str, tuple[str, str]]
) -> None:
    """Push and serve-check refuse a run that the key did not sign, before they do anything else."""
    with pytest.raises(VerificationError, match="key"):
        command([str(made), "--key", keys["other"][1]])
    to = str(made.parent / "current")
    with pytest.raises(VerificationError, match="key"):
        promote_command([str(made), "--key", keys["other"][1], "--to", to, "--without-gate"])
    assert not Path(to).exists()
    with pytest.raises(SettingsError) as refused:  # what comes next is asked for
        command([str(made), "--key", keys["signer"][1], *(["--served=none"] if command is serve_check_command else [])])
    assert "key" not in str(refused.value)


def test_the_cards_say_that_they_are_signed(made: Path, keys: dict[str, tuple[str, str]]) -> None:
    """With the key's hash and how to check it; without a key nothing is said of signatures."""
    results = json.loads((made / "results.json").read_bytes())
    signer = signing.key_id(Path(keys["signer"][1]).read_text())
    assert signer == results["signing"]["key_sha256"]
    for render in (render_model_card, lambda results, **of: render_export_card(results, results["exports"][0], **of)):
        said = render(results, signer=signer).decode()
        assert signer in said
        assert "model_signing verify key path/to/" in said
        assert "model.sig" not in render(results).decode()


def of_another_key(run: Path, keys: dict[str, tuple[str, str]]) -> None:
    """The forger changes a byte, and signs everything again with a key of their own."""
    change_weights(run, keys)
    sign_run(run, keys["other"][0])


def change_weights(run: Path, _keys: object) -> None:
    """The forger changes one byte of the adapter, and every hash and seal that tells of it."""
    data = bytearray((run / WEIGHTS).read_bytes())
    data[-1] ^= 1
    rewrite(run, WEIGHTS, bytes(data))


def change_figure(run: Path, _keys: object) -> None:
    """The forger changes a figure that nothing else in the run depends on, and the seal."""
    forge(run, lambda results: results["hardware"].update(cpu="another"))


def strip(run: Path, _keys: object) -> None:
    """The forger takes the signatures away, and every trace of them."""
    (run / "model.sig").unlink()
    for path in list(run.rglob("model.sig")):
        path.unlink()

    def change(results: dict[str, Any]) -> None:
        del results["signing"]
        results["artifacts"] = [one for one in results["artifacts"] if not one["path"].endswith("model.sig")]

    forge(run, change)


def strip_file(run: Path, _keys: object) -> None:
    """The file of the signature is gone."""
    (run / "model.sig").unlink()


@pytest.mark.parametrize("attack", [of_another_key, change_weights, change_figure, strip, strip_file])
def test_forgeries(run: Path, keys: dict[str, tuple[str, str]], attack: Callable[..., None]) -> None:
    """Found with the signer's key, although the forger has computed all hashes and seals again."""
    attack(run, keys)
    with pytest.raises(VerificationError, match=r"model\.sig|signing"):
        verify_command([str(run), "--key", keys["signer"][1]])


def test_every_byte_of_a_signature(made: Path, keys: dict[str, tuple[str, str]]) -> None:
    """A bit that is changed anywhere in it is found, also in white space."""
    whole, pem = (made / "model.sig").read_bytes(), Path(keys["signer"][1]).read_text()
    assert signing.signed_files(whole, pem)
    for place in range(0, len(whole), 61):
        with pytest.raises(ValueError, match="signature"):
            signing.signed_files(whole[:place] + bytes([whole[place] ^ 2]) + whole[place + 1 :], pem)


def test_an_unsigned_run(tmp_path: Path, keys: dict[str, tuple[str, str]]) -> None:
    """Verifies without a key, and does not with one; a signature that nobody claims is a file too many."""
    run = publish_run(tmp_path / "run", {"quiz": pairs(20)})
    assert verify_command([str(run)]) == 0
    with pytest.raises(VerificationError, match="the run is not signed"):
        verify_command([str(run), "--key", keys["signer"][1]])
    (run / "model.sig").write_text("{}")
    with pytest.raises(VerificationError, match="no such file"):
        verify_command([str(run)])


@pytest.mark.parametrize("curve", [ec.SECP256R1(), ec.SECP384R1(), ec.SECP521R1()], ids=lambda curve: curve.name)
def test_the_same_bytes_again(tmp_path: Path, curve: ec.EllipticCurve) -> None:
    """A signature is deterministic, so that a run which is repeated publishes the same file."""
    private, public = write_key(tmp_path, "key", ec.generate_private_key(curve))
    files = {"b": "1" * 64, "a/c": "0" * 64}
    first, again = (signing.sign(signing.load_private_key(private, None), "x", files) for _ in range(2))
    assert first == again
    assert signing.signed_files(first, signing.load_public_key(public)) == files


def test_keys_that_are_refused(tmp_path: Path) -> None:
    """Another kind of key, one that is not there, a wrong or missing password: said with the setting and the fix."""
    ed, ed_pub = write_key(tmp_path, "ed", ed25519.Ed25519PrivateKey.generate())
    locked, _ = write_key(tmp_path, "locked", ec.generate_private_key(ec.SECP256R1()), b"a long password")
    plain, _ = write_key(tmp_path, "plain", ec.generate_private_key(ec.SECP256R1()))
    (tmp_path / "text").write_text("no key")
    for path, password, match in (
        (ed, None, "kind of key that is not supported"),
        (str(tmp_path / "gone"), None, "cannot be read"),
        (str(tmp_path / "text"), None, "not a private key in PEM"),
        (locked, None, "JOB_SIGN__PASSWORD: is needed"),
        (locked, "wrong", "is not its password"),
        (plain, "any", "is not encrypted"),
    ):
        with pytest.raises(SettingsError, match=match) as caught:
            signing.load_private_key(path, password)
        assert "a long password" not in str(caught.value)
    assert signing.load_private_key(locked, "a long password") is not None
    for path in (ed_pub, plain, str(tmp_path / "text")):
        with pytest.raises(SettingsError, match="not a public key"):
            signing.load_public_key(path)


def test_a_private_key_that_the_library_cannot_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as one on another curve: said like any other key that does not sign."""

    def refuse(*_: object) -> None:
        raise UnsupportedAlgorithm("Curve 1.3.132.0.8 is not supported")

    private, _ = write_key(tmp_path, "key", ec.generate_private_key(ec.SECP256R1()))
    monkeypatch.setattr(serialization, "load_pem_private_key", refuse)
    with pytest.raises(SettingsError, match=r"JOB_SIGN__KEY: .* kind of key that is not supported; make one with"):
        signing.load_private_key(private, None)


def test_a_key_in_the_manifest_that_is_none(run: Path) -> None:
    """Whatever text stands there is told as a difference, also half of a surrogate pair."""
    for text in ("no key", "\ud800"):
        forge(run, lambda results, text=text: results["signing"].update(public_key=text))
        with pytest.raises(VerificationError, match=r"results\.json"):
            verify_command([str(run)])


def test_the_plan_reads_the_key(keys: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """A key that does not sign is found before a GPU is paid for, and one that does is named by its hash."""
    private, public = keys["signer"]
    found = check_other_inputs(load_settings([f"--sign.key={private}"], {}), StorageOptions(), None)
    (check,) = [one for one in found if one.name == "signature"]
    assert check.state == "ok"
    assert signing.key_id(Path(public).read_text())[:12] in check.what
    found = check_other_inputs(load_settings([f"--sign.key={tmp_path}/none.pem"], {}), StorageOptions(), None)
    (check,) = [one for one in found if one.name == "signature"]
    assert (check.state, "JOB_SIGN__KEY" in str(check.error)) == ("wrong", True)


def model_signing(*words: str) -> subprocess.CompletedProcess[str]:
    """Runs the tool of the library model-signing."""
    clean = {name: value for name, value in os.environ.items() if name != "COVERAGE_PROCESS_START"}
    command = [sys.executable, "-W", "ignore", "-m", "model_signing", *words]
    return subprocess.run(command, env=clean, capture_output=True, text=True, check=False)


@pytest.mark.long
def test_the_tool_of_model_signing(run: Path, keys: dict[str, tuple[str, str]], tmp_path: Path) -> None:
    """Verifies the run, and adapter and exported model alone; finds a changed byte, and a key that is another."""
    pytest.importorskip("model_signing")
    places = [run, run / "artifacts/adapter", run / "artifacts/export/merged"]
    alone = [Path(shutil.copytree(place, tmp_path / f"alone-{number}")) for number, place in enumerate(places)]
    for place in alone:
        words = ["verify", "key", str(place), "--signature", str(place / "model.sig")]
        done = model_signing(*words, "--public_key", keys["signer"][1])
        assert done.returncode == 0, done.stderr
        assert "succeeded" in done.stdout.lower()
    words = ["verify", "key", str(alone[1]), "--signature", str(alone[1] / "model.sig")]
    assert model_signing(*words, "--public_key", keys["other"][1]).returncode != 0
    (alone[1] / "adapter_model.safetensors").write_bytes(b"other")
    assert model_signing(*words, "--public_key", keys["signer"][1]).returncode != 0
