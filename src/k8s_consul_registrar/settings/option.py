"""What a setting is: its variable, its flag, what it means and which modes heed it."""

from dataclasses import dataclass

REGISTRAR = "registrar"
PROXY = "proxy"
MODES = (REGISTRAR, PROXY)
BOTH_MODES = frozenset(MODES)
REGISTRAR_ONLY = frozenset({REGISTRAR})
PROXY_ONLY = frozenset({PROXY})


@dataclass(frozen=True, slots=True)
class Option:
    """One setting. A secret has no flag: command lines are there for every process to read."""

    env: str
    help: str
    modes: frozenset[str]
    default: str = ""
    is_secret: bool = False

    @property
    def is_boolean(self) -> bool:
        """Whether the setting is true or false, so that its flag alone means true."""
        return self.default in ("true", "false")

    @property
    def flag(self) -> str:
        """The setting's flag, the same name in the way of flags."""
        return "--" + self.env.lower().replace("_", "-")
