"""Text that others wrote, looked at before it goes anywhere."""

import re

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]")


def has_control(text: str) -> bool:
    """Whether a text has control characters, line ends of any kind, or halves of characters."""
    return _CONTROL.search(text) is not None


def quoted(text: str, most: int = 60) -> str:
    """Show hostile text on one line, in ASCII and cut short."""
    shown = ascii(text[:most])
    return f"{shown}…" if len(text) > most else shown
