"""PEM text: the certificates and keys in it, whatever stands between its blocks."""

import binascii
import os
import re
import tempfile
from _ssl import _test_decode_cert  # type: ignore[attr-defined]  # the only reader of certificates there is
from base64 import b64encode
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from ssl import cert_time_to_seconds
from typing import Any

from k8s_consul_registrar.errors import AccessError

# A label, and a body without five dashes; RFC 7468.
_BLOCK = re.compile(rb"-----BEGIN ([A-Z0-9 ]+)-----([^-]*(?:-(?!----)[^-]*)*)-----END \1-----")
# "X509 CERTIFICATE" is an older name of the same (RFC 7468, 5.2).
_CERTIFICATE_LABELS = (b"CERTIFICATE", b"X509 CERTIFICATE")
_BEGIN = b"-----BEGIN "
_LINE = 64


def certificates(text: bytes, setting: str) -> str:
    """Return the PEM certificates of a bundle, without the comments between them, in any encoding.

    Raises AccessError if there is none, or if one is cut off or damaged: a bundle that is being written
    must not pass for a shorter one.
    """
    blocks = _BLOCK.findall(text)
    found = [_certificate(body, setting) for label, body in blocks if label in _CERTIFICATE_LABELS]
    if any(label == b"TRUSTED CERTIFICATE" for label, _ in blocks):
        raise AccessError(
            f"{setting}: holds a TRUSTED CERTIFICATE, which only OpenSSL knows; "
            "`openssl x509` without -trustout turns it into a CERTIFICATE"
        )
    rest = _BLOCK.sub(b"", text)
    last_line = re.split(rb"[\r\n]", rest)[-1]
    if _BEGIN in rest or (last_line and _BEGIN.startswith(last_line)):
        raise AccessError(f"{setting}: holds an unfinished PEM block")
    if not found:
        raise AccessError(f"{setting}: holds no PEM certificate{_instead(text, blocks)}")
    return "".join(found)


def private_key(text: bytes, setting: str) -> bytes:
    """Return the block of the key in a text that may hold its certificate as well; raises AccessError."""
    for block in _BLOCK.finditer(text):
        if block[1] == b"ENCRYPTED PRIVATE KEY" or b"ENCRYPTED" in block[2]:
            raise AccessError(
                f"{setting}: the key has a password, and must be one that is not encrypted "
                "(`openssl pkey -in KEY -out NEW_KEY` takes the password away)"
            )
        if block[1].endswith(b"PRIVATE KEY"):
            return block[0] + b"\n"
    raise AccessError(f"{setting}: holds no PEM private key{_instead(text, _BLOCK.findall(text))}")


@contextmanager
def private_file(content: bytes) -> Iterator[str]:
    """Hold `content` in a file that no other process can open and that is gone afterwards.

    OpenSSL loads a key from a path only, through Python. On Linux a file in memory spares both the disk and the need for
    a writable one.
    """
    if hasattr(os, "memfd_create"):
        descriptor = os.memfd_create("client-key", os.MFD_CLOEXEC)
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            yield f"/proc/self/fd/{descriptor}"
    else:
        with tempfile.NamedTemporaryFile() as named:
            named.write(content)
            named.flush()
            yield named.name


def _certificate(body: bytes, setting: str) -> str:
    try:
        der = binascii.a2b_base64(b"".join(body.split()), strict_mode=True)
    except ValueError:
        raise AccessError(f"{setting}: holds a damaged certificate") from None
    text = b64encode(der).decode()
    lines = [text[start : start + _LINE] for start in range(0, len(text), _LINE)]
    return "\n".join(["-----BEGIN CERTIFICATE-----", *lines, "-----END CERTIFICATE-----", ""])


def _instead(text: bytes, blocks: Iterable[tuple[bytes, bytes]]) -> str:
    """Say what a text holds in place of what belongs there."""
    if not text.strip():
        return ": it is empty"
    if text[:1] == b"\x30" and text[1:2] >= b"\x80":  # a long SEQUENCE
        return ": it is DER, which `openssl x509 -inform DER` or `openssl pkey -inform DER` turns into PEM"
    for label, _ in blocks:
        for kind in ("certificate", "private key"):
            if label.endswith(kind.upper().encode()):
                return f" but a {kind}: are two files swapped?"
    return ""


def facts_of(certificate: bytes) -> Any:
    """Return the fields of the first certificate as `SSLSocket.getpeercert` does of a peer's, none if it is odd."""
    try:
        with private_file(certificate) as path:
            return _test_decode_cert(path)
    except (OSError, ValueError):
        return {}


@lru_cache(maxsize=16)
def expires_at(certificate: bytes) -> float | None:
    """Return when the first certificate expires (Unix time), None if it cannot be read."""
    facts = facts_of(certificate)
    return cert_time_to_seconds(facts["notAfter"]) if facts else None
