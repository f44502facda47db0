"""The memory every connection of a process reads into: one buffer for all, since reads never overlap.

The event loop asks for a buffer, reads and reports in one go, so what was read must be taken out before the
report returns. A buffer of its own for each of 5,000 kept connections would be 320 MB.
"""

import ssl

from k8s_consul_registrar.proxy.response import AnswerMemory

RECEIVE_SIZE = 64 * 1024
# What 64 KB of TLS records decrypt to, and a record of which the rest had come before.
PLAIN_SIZE = RECEIVE_SIZE + 17 * 1024


class Buffers:
    """The shared memory: `received` is what came off a socket, `plain` what it decrypts to; and `answers`.

    `incoming` is what OpenSSL reads from, empty between two reports: one for each of 5,000 connections would
    hold on to the 22 KB of the largest record it ever saw.
    """

    __slots__ = ("answers", "incoming", "plain", "plain_bytes", "received", "received_bytes")

    def __init__(self) -> None:
        self.received_bytes = bytearray(RECEIVE_SIZE)
        self.received = memoryview(self.received_bytes)
        self.plain_bytes = bytearray(PLAIN_SIZE)
        self.plain = memoryview(self.plain_bytes)
        self.incoming = ssl.MemoryBIO()
        self.answers = AnswerMemory()
