"""Pictures signed by C2PA with a key of the user's. What signs is tested where c2pa-python is installed."""

from __future__ import annotations

import datetime
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from latentdiff import Pipeline
from latentdiff.cli import main
from latentdiff.encoding import FORMATS
from latentdiff.errors import InputError, MissingDependencyError
from latentdiff.generation.result import read_record
from latentdiff.images import open_image, open_stored
from latentdiff.marks import COMPOSITE, GENERATED, source_type_of
from latentdiff.signing import load_signer, signature_of
from tests.generation.test_upscaling import smooth

STEPS: dict[str, Any] = {"num_inference_steps": 2}


@pytest.fixture(autouse=True)
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test runs in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_chain(kind: str) -> None:
    """Write cert.pem, a certificate for signing and that of its authority, and key.pem."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
    from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

    now, authority = datetime.datetime.now(datetime.timezone.utc), ec.generate_private_key(ec.SECP256R1())
    keys: dict[str, Any] = {
        "P-256": lambda: ec.generate_private_key(ec.SECP256R1()),
        "P-384": lambda: ec.generate_private_key(ec.SECP384R1()),
        "Ed25519": ed25519.Ed25519PrivateKey.generate,
        "RSA": lambda: rsa.generate_private_key(65537, 2048),
    }
    key = keys[kind]()

    def certificate(name: str, public: Any, is_authority: bool) -> x509.CertificateBuilder:
        subject, issuer = (
            x509.Name(
                [x509.NameAttribute(NameOID.COMMON_NAME, one), x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Foxes")]
            )
            for one in (name, "Authority")
        )
        names = x509.CertificateBuilder().subject_name(subject).issuer_name(issuer).public_key(public)
        dated = names.not_valid_before(now - datetime.timedelta(1)).not_valid_after(now + datetime.timedelta(1))
        uses = [not is_authority, *[False] * 4, is_authority, is_authority, False, False]
        return (
            dated.serial_number(x509.random_serial_number())
            .add_extension(x509.BasicConstraints(is_authority, None), critical=True)
            .add_extension(x509.KeyUsage(*uses), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        )

    for_signing = x509.ExtendedKeyUsage([ExtendedKeyUsageOID.EMAIL_PROTECTION])
    own = certificate("Painter", key.public_key(), False).add_extension(for_signing, critical=False)
    chain = [
        one.sign(authority, hashes.SHA256()) for one in (own, certificate("Authority", authority.public_key(), True))
    ]
    pem = serialization.Encoding.PEM
    Path("cert.pem").write_bytes(b"".join(one.public_bytes(pem) for one in chain))
    form = serialization.PrivateFormat.PKCS8 if kind == "Ed25519" else serialization.PrivateFormat.TraditionalOpenSSL
    Path("key.pem").write_bytes(key.private_bytes(pem, form, serialization.NoEncryption()))


def manifests(path: str) -> dict[str, Any]:
    """Return the claims of a file as the reference reads them."""
    import c2pa

    with c2pa.Reader(path) as reader:
        assert reader.get_validation_state() == "Valid"
        return reader.get_active_manifest()


def signed(path: str) -> dict[str, Any] | None:
    return signature_of(Path(path).read_bytes())


@pytest.mark.parametrize("kind", ["P-256", "P-384", "Ed25519", "RSA"])
def test_signed_pictures_say_who_made_them_and_by_what(pipe: Pipeline, kind: str) -> None:
    pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    write_chain(kind)
    signer = load_signer("cert.pem", "key.pem")
    whole = pipe("fox", **STEPS)
    part = pipe("fox", image=smooth(32, 32), strength=0.5, **STEPS)
    for result, source_type in ((whole, GENERATED), (part, COMPOSITE)):
        for ending in FORMATS:
            result.save(f"a{ending}", signer=signer)
            result.save(f"b{ending}")
            assert signed(f"a{ending}") == {"state": "Valid", "issuer": "Foxes", "name": "Painter"}
            (actions,) = (one["data"]["actions"] for one in manifests(f"a{ending}")["assertions"])
            assert [(one["action"], one["digitalSourceType"]) for one in actions] == [("c2pa.created", source_type)]
            assert source_type_of(open_stored(f"a{ending}")) == source_type
            assert read_record(f"a{ending}") == read_record(f"b{ending}")
            assert np.array_equal(np.asarray(open_image(f"a{ending}")), np.asarray(open_image(f"b{ending}")))
            assert signed(f"b{ending}") is None


def test_the_command_line_signs_and_inspect_checks(built_model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    write_chain("P-256")
    sign = ["--model", str(built_model), "--sign", "cert.pem", "key.pem"]
    assert main(["generate", "fox", "--steps", "1", "-o", "a.png", *sign]) == 0
    assert main(["replay", "a.png", "-o", "b.webp", *sign]) == 0
    capsys.readouterr()
    for name in ("a.png", "b.webp"):
        assert main(["inspect", name, "--json"]) == 0
        described = json.loads(capsys.readouterr().out)
        assert described["signature"] == {"state": "Valid", "issuer": "Foxes", "name": "Painter"}
        assert (described["prompt"], described["digital_source_type"]) == ("fox", GENERATED)
    changed = bytearray(Path("a.png").read_bytes())
    at = changed.index(b"tEXtparameters") + 20
    changed[at] ^= 1
    assert signature_of(bytes(changed)) == {"state": "Invalid", "issuer": "Foxes", "name": "Painter"}


def test_what_cannot_sign_is_refused_before_a_model_is_loaded(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("c2pa", reason="c2pa-python is not installed")
    write_chain("P-256")
    chain, key = Path("cert.pem").read_bytes(), Path("key.pem").read_bytes()
    authority = chain[chain.index(b"-----BEGIN", 1) :]
    write_chain("P-256")
    other = Path("key.pem").read_bytes()
    for certificates, private, message in (
        (chain, b"none", "key.pem must be a private key as PEM, not encrypted"),
        (chain, chain, "key.pem must be a private key as PEM, not encrypted"),
        (authority, key, "C2PA cannot sign with this certificate and key"),
        (b"none", key, "C2PA cannot sign with this certificate and key"),
        (chain, other, "C2PA cannot sign with this certificate and key"),
    ):
        Path("cert.pem").write_bytes(certificates)
        Path("key.pem").write_bytes(private)
        assert main(["generate", "fox", "--model", "none", "--sign", "cert.pem", "key.pem"]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    assert main(["generate", "fox", "--model", "none", "--sign", "none.pem", "key.pem"]) == 2
    assert "cannot read certificate 'none.pem'" in capsys.readouterr().err


def test_signing_and_no_mark_do_not_go_together(pipe: Pipeline, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "fox", "--no-mark", "--sign", "cert.pem", "key.pem"]) == 2
    assert "--sign says that a model made the pictures, got --no-mark" in capsys.readouterr().err
    with pytest.raises(InputError, match="a signature says that a model made the picture, got mark=False"):
        pipe("fox", **STEPS).save("a.png", mark=False, signer=object())  # type: ignore[arg-type]
    assert not list(Path().iterdir())


def test_without_the_package_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(MissingDependencyError, match=r'c2pa-python, .* `pip install "latentdiff\[c2pa\]"`'):
        load_signer("cert.pem", "key.pem")
    smooth(8, 8).save("a.png")
    Path("a.png").write_bytes(Path("a.png").read_bytes() + b"jumb c2pa")
    with pytest.raises(MissingDependencyError):
        signed("a.png")
    assert main(["generate", "fox", "--model", "none", "--sign", "cert.pem", "key.pem"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
