"""A TLS 1.3 peer by ctypes on libssl that sends KeyUpdates: Python's ssl has no call for them."""

import ctypes
import socket
from typing import Any

import pytest

_ASK_FOR_ANOTHER = 1  # SSL_KEY_UPDATE_REQUESTED
_POINTER, _INT = ctypes.c_void_p, ctypes.c_int
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "TLS_client_method": (_POINTER, []),
    "TLS_server_method": (_POINTER, []),
    "SSL_CTX_new": (_POINTER, [_POINTER]),
    "SSL_CTX_free": (None, [_POINTER]),
    "SSL_CTX_use_certificate_chain_file": (_INT, [_POINTER, ctypes.c_char_p]),
    "SSL_CTX_use_PrivateKey_file": (_INT, [_POINTER, ctypes.c_char_p, _INT]),
    "SSL_new": (_POINTER, [_POINTER]),
    "SSL_free": (None, [_POINTER]),
    "SSL_connect": (_INT, [_POINTER]),
    "SSL_accept": (_INT, [_POINTER]),
    "SSL_key_update": (_INT, [_POINTER, _INT]),
    "SSL_do_handshake": (_INT, [_POINTER]),
    "SSL_write": (_INT, [_POINTER, ctypes.c_char_p, _INT]),
    "SSL_read": (_INT, [_POINTER, ctypes.c_char_p, _INT]),
    "SSL_set_bio": (None, [_POINTER, _POINTER, _POINTER]),
    "BIO_s_mem": (_POINTER, []),
    "BIO_new": (_POINTER, [_POINTER]),
    "BIO_read": (_INT, [_POINTER, ctypes.c_char_p, _INT]),
    "BIO_write": (_INT, [_POINTER, ctypes.c_char_p, _INT]),
}


def _load() -> dict[str, Any]:
    try:
        libraries = [ctypes.CDLL(name) for name in ("libssl.so.3", "libcrypto.so.3")]
    except OSError:
        pytest.skip("there is no libssl.so.3 to send KeyUpdates with")
    loaded = {}
    for name, (result, arguments) in _FUNCTIONS.items():
        function = next(getattr(library, name) for library in libraries if hasattr(library, name))
        function.restype, function.argtypes = result, arguments
        loaded[name] = function
    return loaded


class KeyUpdater:
    """One end of a blocking TLS connection over a socket; a server's end where it has a certificate."""

    def __init__(self, sock: socket.socket, certificate: str = "") -> None:
        self.sock = sock
        self._ssl = library = _load()
        self._context = library["SSL_CTX_new"](
            library["TLS_server_method" if certificate else "TLS_client_method"]()
        )
        if certificate:
            path = certificate.encode()
            assert library["SSL_CTX_use_certificate_chain_file"](self._context, path) == 1
            assert library["SSL_CTX_use_PrivateKey_file"](self._context, path, 1) == 1
        self._connection = library["SSL_new"](self._context)
        self._incoming, self._outgoing = (library["BIO_new"](library["BIO_s_mem"]()) for _ in range(2))
        library["SSL_set_bio"](self._connection, self._incoming, self._outgoing)
        self._buffer = ctypes.create_string_buffer(1 << 16)
        advance = library["SSL_accept" if certificate else "SSL_connect"]
        while True:
            is_complete = advance(self._connection) == 1
            self._flush()
            if is_complete:
                return
            self._receive()

    def close(self) -> None:
        """Free what OpenSSL holds, and close the socket."""
        self._ssl["SSL_free"](self._connection)
        self._ssl["SSL_CTX_free"](self._context)
        self.sock.close()

    def write(self, data: bytes) -> None:
        """Send data."""
        self._ssl["SSL_write"](self._connection, data, len(data))
        self._flush()

    def read(self) -> bytes:
        """Return data, at most 64 KB."""
        while (count := self._ssl["SSL_read"](self._connection, self._buffer, len(self._buffer))) <= 0:
            self._receive()
        return self._buffer.raw[:count]

    def key_updates(self, count: int) -> bytes:
        """Return KeyUpdates as they go over the wire, each of which asks for another."""
        parts = []
        for _ in range(count):
            self._ssl["SSL_key_update"](self._connection, _ASK_FOR_ANOTHER)
            self._ssl["SSL_do_handshake"](self._connection)
            parts.append(self._pending())
        return b"".join(parts)

    def flood(self, most: int = 64 << 20) -> int:
        """Send KeyUpdates until the other end closes, and return how many bytes it took, at most `most`."""
        sent = 0
        try:
            while sent < most:
                updates = self.key_updates(500)
                self.sock.sendall(updates)
                sent += len(updates)
        except OSError:
            pass
        return sent

    def _receive(self) -> None:
        data = self.sock.recv(1 << 16)
        if not data:
            raise EOFError
        self._ssl["BIO_write"](self._incoming, data, len(data))

    def _pending(self) -> bytes:
        count = self._ssl["BIO_read"](self._outgoing, self._buffer, len(self._buffer))
        return self._buffer.raw[:count] if count > 0 else b""

    def _flush(self) -> None:
        while data := self._pending():
            self.sock.sendall(data)
