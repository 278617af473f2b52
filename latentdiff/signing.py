"""Sign pictures by C2PA ("Content Credentials"), with a key of the user's: who says that a model made them.

A signature is of the whole file and another each time, so that signed files of the same seed differ in it.
"""

from __future__ import annotations

import io
import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from PIL import Image

from latentdiff import __version__
from latentdiff.encoding import encode
from latentdiff.errors import InputError, MissingDependencyError
from latentdiff.files import read_file
from latentdiff.marks import GENERATED

if TYPE_CHECKING:
    from types import ModuleType

__all__ = ["Signer", "load_signer", "signature_of"]

EXTRA = 'pip install "latentdiff[c2pa]"'
MAX_PEM = 2**20  # bytes of a certificate chain or a key
CURVES = {"secp256r1": "es256", "secp384r1": "es384", "secp521r1": "es512"}
# No second picture inside the picture, and no address that a file or a certificate names is ever fetched.
SETTINGS = {
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}


@dataclass(frozen=True)
class Signer:
    """A certificate chain and its private key, as PEM; made by `load_signer`."""

    certificates: bytes
    key: bytes = field(repr=False)
    algorithm: str

    def sign(self, data: bytes, kind: str, source_type: str) -> bytes:
        """Return the bytes of a picture file with a signed manifest that says by what it was made.

        Args:
            data: of the file.
            kind: its format, one of `encoding.FORMATS`.
            source_type: IPTC digital source type; see `marks`.

        Raises:
            InputError: the certificate is none that C2PA allows, or the key is of another one.

        Source: C2PA technical specification 2.2, section 18.15 (actions).
        """
        c2pa = _c2pa()
        action = {"action": "c2pa.created", "digitalSourceType": source_type}
        manifest = {
            "claim_generator_info": [{"name": "latentdiff", "version": __version__}],
            "assertions": [{"label": "c2pa.actions.v2", "data": {"actions": [action]}}],
        }
        signed = io.BytesIO()
        try:
            info = c2pa.C2paSignerInfo(self.algorithm, self.certificates, self.key, None)
            with (
                c2pa.Context(c2pa.Settings.from_dict(SETTINGS)) as context,
                c2pa.Signer.from_info(info) as signer,
                c2pa.Builder(manifest, context) as builder,
            ):
                builder.sign(signer, f"image/{kind.lower()}", io.BytesIO(data), signed)
        except c2pa.C2paError as error:
            remedy = "pass the chain of a certificate for signing, its own first, and its key"
            raise InputError(f"C2PA cannot sign with this certificate and key ({error}); {remedy}") from error
        return signed.getvalue()


def load_signer(certificate: str | os.PathLike[str], key: str | os.PathLike[str]) -> Signer:
    """Load what pictures are signed with, and try it on one.

    Args:
        certificate: PEM file of the chain, the signer's own certificate first, the root left out.
        key: PEM file of its private key: EC (P-256, P-384, P-521), Ed25519 or RSA, not encrypted.

    Raises:
        InputError: a file cannot be read, or C2PA cannot sign with it.
        MissingDependencyError: c2pa-python is not installed.
    """
    _c2pa()
    pem, algorithm = _private_key(read_file(key, MAX_PEM, "key"), os.fspath(key))
    signer = Signer(read_file(certificate, MAX_PEM, "certificate"), pem, algorithm)
    signer.sign(encode(Image.new("RGB", (8, 8))), "PNG", GENERATED)
    return signer


def signature_of(data: bytes) -> dict[str, Any] | None:
    """Return who signed a picture and whether that holds: "state" Valid, Trusted or Invalid, "issuer" and "name".

    Args:
        data: content of a PNG, JPEG or WebP file.

    Returns:
        None where there is no signature; only "state" where it cannot be read.

    Raises:
        MissingDependencyError: there is one, and c2pa-python is not installed.
    """
    if b"jumb" not in data or b"c2pa" not in data:  # boxes of a manifest
        return None
    c2pa = _c2pa()
    try:
        with (
            c2pa.Context(c2pa.Settings.from_dict(SETTINGS)) as context,
            c2pa.Reader(io.BytesIO(data), context=context) as reader,
        ):
            state, manifest = reader.get_validation_state(), reader.get_active_manifest() or {}
    except c2pa.C2paError.ManifestNotFound:
        return None
    except c2pa.C2paError:
        return {"state": "Invalid"}
    by = manifest.get("signature_info", {})
    return {"state": state, "issuer": by.get("issuer"), "name": by.get("common_name")}


def _private_key(pem: bytes, name: str) -> tuple[bytes, str]:
    """Return a key as C2PA's library reads it, PKCS #8, and the algorithm that it signs with."""
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa

    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:  # a TypeError where it is encrypted
        raise InputError(f"{name} must be a private key as PEM, not encrypted ({error}); convert it") from error
    algorithm = None
    if isinstance(key, ec.EllipticCurvePrivateKey):
        algorithm = CURVES.get(key.curve.name)
    elif isinstance(key, (ed25519.Ed25519PrivateKey, rsa.RSAPrivateKey)):
        algorithm = "ed25519" if isinstance(key, ed25519.Ed25519PrivateKey) else "ps256"
    if algorithm is None:
        raise InputError(f"{name} must be a key of P-256, P-384, P-521, Ed25519 or RSA, got another; make one of these")
    form = serialization.PrivateFormat.PKCS8
    return key.private_bytes(serialization.Encoding.PEM, form, serialization.NoEncryption()), algorithm


def _c2pa() -> ModuleType:
    try:
        import c2pa
    except ImportError as error:
        raise MissingDependencyError(
            f"signatures need the package c2pa-python, which is not installed; `{EXTRA}`"
        ) from error
    return c2pa
