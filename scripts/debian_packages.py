"""Debian packages without installing them: apt runs on the machine's sources with its own folders."""

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
KEYRINGS = Path("/usr/share/keyrings")

# The suites of Debian's own archive; a third party's suites have other names.
CODENAMES = {
    "buster",
    "bullseye",
    "bookworm",
    "trixie",
    "forky",
    "oldoldstable",
    "oldstable",
    "stable",
    "testing",
    "sid",
}
STEP_TIMEOUT = 300  # seconds for one apt or dpkg step


class Source(NamedTuple):
    """The addresses of one Debian archive; `signed_by` is the text of that field as apt reads it."""

    uris: str
    signed_by: str


class Unavailable(Exception):
    """Raised when this machine cannot fetch the servers; the text is the reason."""


def deb822_stanzas(text: str) -> Iterator[dict[str, str]]:
    """Yield the stanzas of a `.sources` file; continuation lines of a field stay as written."""
    fields: dict[str, str] = {}
    last = ""
    for line in [*text.splitlines(), ""]:
        if line.startswith("#"):
            continue
        if not line.strip():
            if fields:
                yield fields
            fields, last = {}, ""
        elif line[0].isspace():
            if last:
                fields[last] += "\n" + line
        elif ":" in line:
            name, value = line.split(":", 1)
            last = name.strip().lower()
            fields[last] = value.strip()


def one_line_stanza(line: str) -> dict[str, str]:
    """Return a one-line source (`deb [options] uri suite component…`) as a stanza, else an empty one."""
    words, options = line.split("#", 1)[0].strip(), ""
    if words.startswith("deb [") and "]" in words:
        options, rest = words[len("deb [") :].split("]", 1)
        words = "deb " + rest
    kind, *fields = words.split() or [""]
    if kind != "deb" or len(fields) < 3:
        return {}
    given = dict(option.split("=", 1) for option in options.split() if "=" in option)
    return {
        "types": "deb",
        "uris": fields[0],
        "suites": fields[1],
        "components": " ".join(fields[2:]),
        "signed-by": given.get("signed-by", ""),
    }


def debian_source(stanza: dict[str, str]) -> Source | None:
    """Return the archive that a stanza names, or None unless it is Debian's main archive.

    Security archives are skipped: they have other addresses, and all wanted packages are in main.
    """
    is_wanted = (
        stanza.get("enabled", "yes").lower() not in {"no", "false", "0"}
        and "deb" in stanza.get("types", "").split()
        and "main" in stanza.get("components", "").split()
        and not CODENAMES.isdisjoint(stanza.get("suites", "").split())
    )
    uris = " ".join(uri for uri in stanza.get("uris", "").split() if "security" not in uri)
    return Source(uris, stanza.get("signed-by", "")) if is_wanted and uris else None


def debian_sources(config: Path) -> list[Source]:
    """Read the machine's Debian sources, each address once: the first source that names it counts."""
    stanzas: list[dict[str, str]] = []
    for path in sorted((config / "sources.list.d").glob("*.sources")):
        stanzas += deb822_stanzas(path.read_text(errors="replace"))
    for path in [config / "sources.list", *sorted((config / "sources.list.d").glob("*.list"))]:
        if path.is_file():
            stanzas += map(one_line_stanza, path.read_text(errors="replace").splitlines())
    found = (debian_source(stanza) for stanza in stanzas)
    return list({source.uris: source for source in reversed([*found]) if source}.values())[::-1]


def signed_by(source: Source) -> str:
    """Return the keys to trust: those of this source, and Debian's keyring, which other suites need."""
    if "\n" in source.signed_by:  # the key itself, which cannot be combined with a file's name
        return source.signed_by
    keyrings = [
        path
        for name in ("debian-archive-keyring.gpg", "debian-archive-keyring.pgp")
        if (path := KEYRINGS / name).is_file()
    ]
    names = source.signed_by.replace(",", " ").split() + [str(path) for path in keyrings[:1]]
    return " ".join(dict.fromkeys(names))


def sources_text(sources: list[Source], suites: list[str]) -> str:
    """Return a `.sources` file with these suites at the addresses of the sources."""
    stanzas = []
    for source in sources:
        keys = signed_by(source)
        fields = ["Types: deb", f"URIs: {source.uris}", f"Suites: {' '.join(suites)}", "Components: main"]
        stanzas.append("\n".join([*fields, *([f"Signed-By: {keys}"] if keys else [])]))
    return "\n\n".join(stanzas) + "\n"


def apt_conf(work: Path) -> str:
    """Return settings that keep apt inside `work`; the machine's own settings, such as a proxy, stay valid.

    Hooks are cleared because they act on the system. Valid-Until is ignored because the dates of suites that
    are no longer updated have passed.
    """
    return f"""
Dir::State "{work}/state";
Dir::State::status "{work}/state/status";
Dir::Cache "{work}/cache";
Dir::Etc::sourcelist "/dev/null";
Dir::Etc::sourceparts "{work}/sources.list.d";
Dir::Etc::preferences "/dev/null";
Dir::Etc::preferencesparts "/dev/null";
Acquire::Languages "none";
Acquire::Check-Valid-Until "false";
Acquire::Retries "2";
Acquire::http::Timeout "30";
Acquire::https::Timeout "30";
APT::Sandbox::User "root";
APT::Get::List-Cleanup "false";
#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
"""


def run(log: Path, reason: str, *command: str, cwd: Path) -> None:
    """Run one step, its output in `log` only because it names hosts; raise Unavailable if it fails."""
    with log.open("ab") as output:
        output.write(f"$ {' '.join(command)}\n".encode())
        output.flush()
        try:
            done = subprocess.run(
                command,
                cwd=cwd,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                timeout=STEP_TIMEOUT,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired) as error:
            raise Unavailable(f"{reason} ({type(error).__name__}; see {log.relative_to(ROOT)})") from error
    if done.returncode:
        raise Unavailable(f"{reason} (exit {done.returncode}; see {log.relative_to(ROOT)})")
