"""The configuration file: what a value may be, which source takes precedence, and every mistake in one run."""

import os
import socket
from pathlib import Path

import pytest

from k8s_consul_registrar.cli import main
from k8s_consul_registrar.errors import SettingsError
from k8s_consul_registrar.settings.reading import gather, read_proxy, read_registrar
from k8s_consul_registrar.settings.registrar import RegistrarSettings

SECRET = "s3cr3t-marker-0123456789"


def written(folder: Path, text: str | bytes) -> str:
    """Write a configuration file and return its path."""
    path = folder / "settings.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def read(
    folder: Path, text: str, flags: dict[str, str] | None = None, **environment: str
) -> RegistrarSettings:
    """Return the registrar's settings of a file, an environment and flags."""
    return read_registrar(gather(environment, flags, written(folder, text)))


def problems(folder: Path, text: str | bytes, **environment: str) -> tuple[str, ...]:
    """Return the mistakes of a file and an environment."""
    with pytest.raises(SettingsError) as raised:
        read_registrar(gather({"CLUSTER_NAME": "lab", **environment}, {}, written(folder, text)))
    return raised.value.problems


def test_values_of_every_type_are_taken(tmp_path: Path) -> None:
    """Lists, mappings, booleans, numbers and texts become the values that a variable would give."""
    settings = read(
        tmp_path,
        """
        CLUSTER_NAME: lab
        NAMESPACES: [shop, pay]
        META_KEYS: {cluster: cluster_name, metrics_path: path}
        WATCH: false
        SYNC_PERIOD: 30.5
        ADMIN_PORT: 0
        PREVIOUS_INSTANCES: ["", blue]
        SERVICE_TAGS: ["cluster={cluster}"]
        INSTANCE:
        """,
    )
    as_variables = read_registrar(
        {
            "CLUSTER_NAME": "lab",
            "NAMESPACES": "shop,pay",
            "META_KEYS": "cluster=cluster_name,metrics_path=path",
            "WATCH": "false",
            "SYNC_PERIOD": "30.5",
            "ADMIN_PORT": "0",
            "PREVIOUS_INSTANCES": '"",blue',
            "SERVICE_TAGS": "cluster={cluster}",
        }
    )
    assert (settings.cluster_name, settings.has_default_name) == ("lab", False)
    assert (settings.selection, settings.naming) == (as_variables.selection, as_variables.naming)
    assert (settings.sync_period, settings.backend.follows) == (30.5, False)
    assert settings.previous_instances == {"", "blue"}
    assert settings.common.admin_port == 0


def test_texts_as_in_variables_are_taken(tmp_path: Path) -> None:
    """A value in quotes is read like a variable's."""
    settings = read(tmp_path, 'NAMESPACES: "shop,pay"\nSYNC_PERIOD: "60"\nWATCH: "off"\n')
    assert (settings.selection.namespaces, settings.sync_period) == (("shop", "pay"), 60)
    assert not settings.backend.follows


def test_flags_precede_variables_and_those_the_file(tmp_path: Path) -> None:
    """A variable with an empty value counts as unset, so that the file's value stays."""
    text = "CLUSTER_NAME: file\nINSTANCE: file\nSYNC_PERIOD: 30\n"
    settings = read(
        tmp_path,
        text,
        {"CLUSTER_NAME": "flag"},
        CLUSTER_NAME="variable",
        INSTANCE="variable",
        SYNC_PERIOD=" ",
    )
    assert (settings.cluster_name, settings.instance, settings.sync_period) == ("flag", "variable", 30)


def test_mistake_in_a_flag_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    """The line names the file only where its value is the one that counts."""
    with pytest.raises(SettingsError) as raised:
        read(tmp_path, "CLUSTER_NAME: a b\nINSTANCE: c d\n", {"CLUSTER_NAME": "e f"})
    cluster, instance = raised.value.problems
    assert "'e f'" in cluster
    assert "settings.yaml" not in cluster
    assert instance.endswith("settings.yaml)")


def test_settings_of_the_other_mode_are_ignored(tmp_path: Path) -> None:
    """One file serves both modes."""
    path = written(tmp_path, "CLUSTER_NAME: lab\nPORT: 9090\n")
    assert read_registrar(gather({}, {}, path)).cluster_name == "lab"
    assert read_proxy(gather({}, {}, path)).port == 9090


def test_values_of_the_file_are_shown_like_variables(tmp_path: Path) -> None:
    """Credentials and the status page see them in the environment."""
    settings = read(tmp_path, "KUBECONFIG: /from/file\n", HOME="/root")
    assert settings.common.environment["KUBECONFIG"] == "/from/file"
    assert settings.common.environment["HOME"] == "/root"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("", "is empty"),
        ("# only a comment\n", "is empty"),
        ("- a\n- b\n", "is not a mapping"),
        ("just a text", "is not a mapping"),
        ("A: [\n", "is not valid YAML (line"),
        ("A: 1\n---\nB: 2\n", "is not valid YAML"),
        ("INSTANCE: a\nINSTANCE: b\n", "has the key INSTANCE more than once"),
        ("META_KEYS: {cluster: a, cluster: b}\n", "has the key cluster more than once"),
        (b"\xff\xfe\x00\x01\x80", "is not a text in UTF-8"),
        (b"A: \x00\x01\n", "is not valid YAML"),
        ("A: " + "9" * 5000 + "\n", "is not valid YAML"),
        ("A: " + "[" * 5000 + "\n", "is not valid YAML"),
        ("? [a]\n: b\n", "is not valid YAML"),
        ("A: !!python/object:os.system x\n", "is not valid YAML"),
        ("A: " + "x" * (1 << 20), "is larger than 1 MiB"),
    ],
)
def test_file_that_cannot_be_used_is_one_line(tmp_path: Path, text: str | bytes, problem: str) -> None:
    """The line names the file and what is wrong with it."""
    (line,) = problems(tmp_path, text)
    assert line.startswith(f"--config {tmp_path}/settings.yaml: {problem}")
    assert "\n" not in line


def test_file_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    """Missing, a directory, and a name that is none."""
    for path, problem in (
        (str(tmp_path / "absent.yaml"), "there is no such file"),
        (str(tmp_path), "is a directory, not a file"),
        ("/" + "x" * 5000, "cannot be read: File name too long"),
        ("/a\0b", "cannot be read: is no path"),
    ):
        (line,) = gather({}, {}, path).problems
        assert line == f"--config {path}: {problem}"


@pytest.mark.skipif(not hasattr(socket, "AF_UNIX"), reason="there are no Unix sockets here")
def test_special_file_is_one_line(tmp_path: Path) -> None:
    """A socket cannot be opened, and an endless file is not read to its end."""
    with socket.socket(socket.AF_UNIX) as server:
        name = os.path.relpath(tmp_path / "s.yaml")
        server.bind(name)
        (line,) = gather({}, {}, str(tmp_path / "s.yaml")).problems
    assert "cannot be read: " in line
    (line,) = gather({}, {}, "/dev/zero").problems
    assert line == "--config /dev/zero: is larger than 1 MiB"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("CLUSTR_NAME: a", "CLUSTR_NAME: is not a setting: CLUSTER_NAME is meant? (in "),
        ("cluster_name: a", "cluster_name: is not a setting: CLUSTER_NAME is meant? (in "),
        ("cluster-name: a", "cluster-name: is not a setting: CLUSTER_NAME is meant? (in "),
        ("XYZZY: a", "XYZZY: is not a setting (in "),
        ("MODE: proxy", "MODE: is not read from a file"),
        ("1: a", "a key: is not the name of a setting"),
        ("on: a", "a key: is not the name of a setting"),
        ("INSTANCE: no", "INSTANCE: must be a text: put it in quotes"),
        ("INSTANCE: 007", "INSTANCE: must be a text: put it in quotes"),
        ("INSTANCE: 2026-01-02", "INSTANCE: must be a text: put it in quotes"),
        ("INSTANCE: [a]", "INSTANCE: must be a text (in "),
        ("WATCH: 1", "WATCH: must be true or false (in "),
        ("WATCH: [true]", "WATCH: must be true or false (in "),
        ("SYNC_PERIOD: true", "SYNC_PERIOD: must be a number (in "),
        ("ADMIN_PORT: [1]", "ADMIN_PORT: must be a whole number (in "),
        ("NAMESPACES: 1", "NAMESPACES: must be a list (in "),
        ("NAMESPACES: {a: b}", "NAMESPACES: must be a list (in "),
        ("NAMESPACES: [1, a]", "NAMESPACES: must hold texts only: put it in quotes"),
        ("NAMESPACES: [[a]]", "NAMESPACES: must hold texts only (in "),
        ("NAMESPACES: ['a,b']", "NAMESPACES: holds an entry with ',', which separates entries"),
        ("META_KEYS: 5", "META_KEYS: must be a mapping"),
        ("META_KEYS: {a: 1}", "META_KEYS: must hold texts only: put it in quotes"),
        ("META_KEYS: {a: 'b=c'}", "META_KEYS: holds an entry with '=', which separates entries"),
        ('INSTANCE: "a\\0b"', "INSTANCE: holds characters that no variable can have"),
        ('INSTANCE: "\\ud800"', "INSTANCE: holds characters that no variable can have"),
        ("INSTANCE: a b", "INSTANCE: 'a b' must be letters"),
        ("BRAKE_CONFIRM: -1", "BRAKE_CONFIRM: '-1' is not a number of seconds"),
        ("BRAKE_CONFIRM: .nan", "BRAKE_CONFIRM: 'nan' is not a number of seconds"),
        ("ADMIN_PORT: 1.5", "ADMIN_PORT: '1.5' is not a whole number"),
    ],
)
def test_value_that_cannot_be_used_is_one_line(tmp_path: Path, text: str, problem: str) -> None:
    """The line names the setting, what is wrong, and the file."""
    (line,) = problems(tmp_path, text)
    assert line.startswith(problem)
    assert line.endswith(f"(in {tmp_path}/settings.yaml)")


def test_every_mistake_of_every_source_at_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The command ends with 2 and lists mistakes of file, environment and flags together."""
    path = written(tmp_path, "CLUSTR_NAME: a\nINSTANCE: no\nADMIN_PORT: x\n")
    assert main(["registrar", "--config", path, "--brake-confirm", "soon"], {"LOG_LEVEL": "loud"}) == 2
    said = capsys.readouterr().err
    for name in ("CLUSTR_NAME", "INSTANCE", "ADMIN_PORT", "BRAKE_CONFIRM", "LOG_LEVEL"):
        assert said.count(f"  - {name}: ") == 1, name


@pytest.mark.parametrize("command", ["registrar", "proxy", "check", "plan", "sync", "purge"])
def test_missing_file_ends_every_command_with_2(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Whatever else the environment holds."""
    assert main([command, "--config", "/absent.yaml"], {"HOME": "/nonexistent", "CLUSTER_NAME": "lab"}) == 2
    assert capsys.readouterr().err.count("--config /absent.yaml: there is no such file") == 1


@pytest.mark.parametrize(
    "text",
    [
        f"CONSUL_HTTP_TOKEN: {SECRET}",
        f"CONSUL_HTTP_TOKEN: [{SECRET}]",
        f"CONSUL_HTTP_TOKN: {SECRET}",
        f"CONSUL_HTTP_TOKEN: {SECRET}\nCONSUL_HTTP_TOKEN: {SECRET}",
        f"INSTANCE: [{SECRET}]",
        f"NAMESPACES: ['{SECRET},']",
        f"A: '{SECRET}\nB",
        f"A: *{SECRET}",
        f"A: !{SECRET} x",
        f"{SECRET}",
        f"- {SECRET}",
        f"CONSUL_HTTP_TOKEN_FILE: {SECRET}",
        f"CONSUL_ADDRESS: http://user:{SECRET}@consul:8500",
        f'CONSUL_CLIENT_KEY: "-----BEGIN PRIVATE KEY-----\\n{SECRET}"',
    ],
)
def test_secret_in_the_file_is_refused_and_not_shown(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A configuration file is no place for a secret, and no message quotes one."""
    assert main(["registrar", "--config", written(tmp_path, text)], {"CLUSTER_NAME": "lab"}) == 2
    said = capsys.readouterr()
    assert SECRET not in said.out + said.err


def test_secret_in_the_file_is_told_where_it_belongs(tmp_path: Path) -> None:
    """The message names the variable's file, which may be given anywhere."""
    (line,) = problems(tmp_path, f"CONSUL_HTTP_TOKEN: {SECRET}")
    assert line.startswith("CONSUL_HTTP_TOKEN: is a secret and must not be in a configuration file")
    assert "CONSUL_HTTP_TOKEN_FILE" in line


@pytest.mark.parametrize(
    "name",
    ["CONSUL_HTTP_TOKEN_FILE", "CONSUL_CLIENT_KEY", "HTTP_SD_BEARER_TOKEN_FILE", "HTTP_SD_TLS_KEY_FILE"],
)
def test_secret_given_as_a_file_name_is_not_shown(name: str) -> None:
    """A text that is neither an absolute path nor a file may be the secret itself."""
    with pytest.raises(SettingsError) as raised:
        read_registrar({"CLUSTER_NAME": "lab", name: SECRET})
    assert f"{name}: there is no such file" in str(raised.value)
    assert SECRET not in str(raised.value)


@pytest.mark.parametrize(
    "content",
    [
        f"-----BEGIN PRIVATE KEY----- {SECRET}",
        f"-----BEGIN PRIVATE KEY-----\n{SECRET}",
        f"users:\n- {SECRET}",
        f'{{"users": "{SECRET}"}}',
    ],
)
@pytest.mark.parametrize("name", ["KUBECONFIG", "CONSUL_CACERT", "CONSUL_CLIENT_KEY", "HTTP_SD_STATE_FILE"])
def test_content_of_a_file_given_as_its_name_is_not_shown(name: str, content: str) -> None:
    """A certificate with its key, or a whole kubeconfig, in a variable that names a file."""
    with pytest.raises(SettingsError) as raised:
        read_registrar({"CLUSTER_NAME": "lab", name: content})
    assert f"{name}: must be the path of a file, not its content" in str(raised.value)
    assert SECRET not in str(raised.value)


def test_relative_path_of_a_file_with_a_secret_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """If the file is there."""
    (tmp_path / "token").write_text(SECRET)
    monkeypatch.chdir(tmp_path)
    settings = read_registrar({"CLUSTER_NAME": "lab", "CONSUL_HTTP_TOKEN_FILE": "token"})
    assert settings.consul.token_file == "token"


def test_secret_as_the_name_of_the_configuration_file_is_not_shown() -> None:
    """Only what is a path, or ends like a YAML file, is quoted."""
    (line,) = gather({}, {}, SECRET).problems
    assert line == "--config: there is no such file"
    (line,) = gather({}, {}, "absent.yml").problems
    assert line == "--config absent.yml: there is no such file"


@pytest.mark.parametrize("form", [[f"--consul-http-token={SECRET}"], ["--consul-http-token", SECRET]])
def test_secret_as_a_flag_is_refused_and_not_shown(
    form: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A command line can be read by every process, and an error must not repeat it."""
    with pytest.raises(SystemExit) as raised:
        main(["registrar", *form], {})
    assert raised.value.code == 2
    said = capsys.readouterr().err
    assert "set the variable CONSUL_HTTP_TOKEN" in said
    assert SECRET not in said
