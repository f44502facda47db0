"""The reference that derives from the declarations: tables, schema, template of variables, and the flags."""

import json
import re
import subprocess
import sys
from pathlib import Path

import jsonschema
import pytest

from k8s_consul_registrar.cli import main
from k8s_consul_registrar.settings.reading import SETTINGS, read_proxy, read_registrar, shown_settings
from k8s_consul_registrar.settings.reference import OUTPUTS, env, json_schema, markdown
from support.files import PACKAGE, ROOT
from support.waiting import PATIENCE

SECRET = "s3cr3t-marker-0123456789"
SHOWN_YAML = re.compile(r"```yaml\n(CLUSTER_NAME.*?)```", re.DOTALL)


@pytest.mark.parametrize("output", OUTPUTS)
def test_every_output_names_every_setting(output: str, capsys: pytest.CaptureFixture[str]) -> None:
    """The command prints each with its default, and no value of the environment."""
    assert main(["settings", "--output", output], {"CONSUL_HTTP_TOKEN": SECRET, "INSTANCE": "by-choice"}) == 0
    shown = capsys.readouterr().out
    assert [one.env for one in SETTINGS if not re.search(rf"\b{one.env}\b", shown)] == []
    assert SECRET not in shown
    assert "by-choice" not in shown


def test_default_output_is_markdown(capsys: pytest.CaptureFixture[str]) -> None:
    """Tables in groups."""
    assert main(["settings"], {}) == 0
    assert capsys.readouterr().out == markdown()
    assert "| `SYNC_PERIOD` | `600` |" in markdown()


def test_unknown_output_is_exit_2() -> None:
    """The outputs there are, are named by the parser."""
    with pytest.raises(SystemExit) as raised:
        main(["settings", "--output", "toml"], {})
    assert raised.value.code == 2


def test_template_of_variables_sets_nothing() -> None:
    """A name set to its default is not one that was not set: CLUSTER_NAME would count as chosen."""
    assert [line for line in env().splitlines() if line and not line.startswith("#")] == []


def test_template_with_every_default_is_accepted() -> None:
    """Each commented line is a variable that its setting takes."""
    given = dict(line[1:].split("=", 1) for line in env().splitlines() if re.match(r"#[A-Z_]+=", line))
    assert given.keys() == {one.env for one in SETTINGS}
    assert read_registrar(given).sync_period == 600
    assert read_proxy(given).port == 8080


class TestSchema:
    """The JSON schema of the configuration file."""

    schema = json.loads(json_schema())
    validator = jsonschema.Draft202012Validator(schema)

    def test_is_a_schema(self) -> None:
        """By the rules of its draft."""
        jsonschema.Draft202012Validator.check_schema(self.schema)

    def test_takes_the_defaults_and_choices(self) -> None:
        """Each default is valid by its own schema."""
        defaults = {
            name: one["default"] for name, one in self.schema["properties"].items() if "default" in one
        }
        assert defaults["WATCH"] is True
        assert defaults["SYNC_PERIOD"] == 600
        assert defaults["NODE_ADDRESS_TYPES"] == ["InternalIP", "ExternalIP"]
        self.validator.validate(defaults)
        assert self.schema["properties"]["CONSUL_BACKEND"]["enum"] == ["agent", "catalog", "auto", "none"]

    @pytest.mark.parametrize(
        "wrong",
        [
            {"CLUSTER_NAME": "a b"},
            {"CLUSTR_NAME": "a"},
            {"CONSUL_BACKEND": "etcd"},
            {"ADMIN_PORT": 70000},
            {"BRAKE_CONFIRM": -1},
            {"NAMESPACES": ["A"]},
            {"NAMESPACES": "a"},
            {"LEASE_NAME": "-a"},
            {"ANNOTATION_PREFIX": "prometheus.io"},
            {"DISCOVER": ["jobs"]},
            {"WATCH": 1},
            {"META_KEYS": ["a=b"]},
            {"CONSUL_HTTP_TOKEN": "x"},
        ],
    )
    def test_refuses_what_the_reader_refuses(self, wrong: dict[str, object]) -> None:
        """Unknown keys, secrets, and values of the wrong type, choice, pattern or size."""
        assert list(self.validator.iter_errors(wrong))


# A subprocess runs with a copy of the package in which this line is all that was added.
LINE = (
    '    trial_window: float = Setting("TRIAL_WINDOW", parse.seconds(1), "7").means("Seconds of `trial`")\n\n'
)
AFTER = '    """All settings of the proxy; times are in seconds."""\n\n'
PROGRAM = """
import contextlib, io, json, sys
from k8s_consul_registrar.cli import main
from k8s_consul_registrar.settings.reading import gather, read_proxy, shown_settings

def shown(*arguments):
    out = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.suppress(SystemExit):
        main(list(arguments), {})
    return out.getvalue()

def mistake(*arguments, **environment):
    out = io.StringIO()
    with contextlib.redirect_stderr(out):
        code = main(list(arguments), environment)
    return [code, out.getvalue()]

open(sys.argv[1], "w").write("TRIAL_WINDOW: 9\\n")
json.dump({
    "default": read_proxy({}).trial_window,
    "variable": read_proxy({"TRIAL_WINDOW": "8"}).trial_window,
    "file": read_proxy(gather({}, {}, sys.argv[1])).trial_window,
    "flag": read_proxy(gather({}, {"TRIAL_WINDOW": "6"}, sys.argv[1])).trial_window,
    "mistake": mistake("proxy", "--trial-window", "0.5"),
    "lookalike": read_proxy({"TRIAL_WINDOWS": "8"}).common.warnings,
    "help": shown("--help"),
    "flags": shown("proxy", "--help"),
    "other": shown("registrar", "--help"),
    "completion": shown("completion", "bash"),
    "markdown": shown("settings"),
    "schema": json.loads(shown("settings", "--output", "json-schema")),
    "env": shown("settings", "--output", "env"),
    "page": shown_settings({}, "proxy"),
}, sys.stdout)
"""


def test_new_setting_is_one_line_and_appears_everywhere(tmp_path: Path) -> None:
    """Value, flag, help, completion, tables, schema, template, status page and configuration file follow from it."""
    copy = tmp_path / "k8s_consul_registrar"
    for path in PACKAGE.rglob("*.py"):
        target = copy / path.relative_to(PACKAGE)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(path.read_bytes())
    proxy = copy / "settings" / "proxy.py"
    source = proxy.read_text()
    assert source.count(AFTER) == 1
    proxy.write_text(source.replace(AFTER, AFTER + LINE))
    command = (sys.executable, "-c", PROGRAM, str(tmp_path / "settings.yaml"))
    environment = {"PYTHONPATH": str(tmp_path), "HOME": "/nonexistent"}
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, timeout=PATIENCE, env=environment
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert [seen[source] for source in ("default", "variable", "file", "flag")] == [7, 8, 9, 6]
    assert seen["mistake"][0] == 2
    assert "TRIAL_WINDOW: '0.5' is not a number of seconds, 1 or more" in seen["mistake"][1]
    assert seen["lookalike"] == ["TRIAL_WINDOWS is not a setting: TRIAL_WINDOW is meant?"]
    assert "TRIAL_WINDOW [p]\n      Seconds of trial. Default: 7." in seen["help"]
    assert "--trial-window …" in seen["flags"]
    assert "--trial-window" not in seen["other"]
    assert "--trial-window" in seen["completion"]
    assert "| `TRIAL_WINDOW` | `7` | Seconds of `trial` |" in seen["markdown"]
    assert seen["schema"]["properties"]["TRIAL_WINDOW"] == {
        "type": "number",
        "minimum": 1,
        "maximum": 366 * 86400,
        "description": "Seconds of trial",
        "default": 7,
    }
    assert "#TRIAL_WINDOW=7" in seen["env"]
    assert seen["page"]["TRIAL_WINDOW"] == "7"
    checked = subprocess.run(
        (sys.executable, ROOT / "scripts" / "update_docs.py", "--check"),
        capture_output=True,
        text=True,
        check=False,
        timeout=PATIENCE,
        env=environment,
    )
    assert checked.returncode == 1
    assert "must have a text for each setting and no other: ['TRIAL_WINDOW']" in checked.stderr


def test_secrets_are_masked_wherever_settings_are_shown() -> None:
    """The status page says only that one is set, and no repr holds it."""
    environment = {"CLUSTER_NAME": "lab", "CONSUL_HTTP_TOKEN": SECRET}
    settings = read_registrar(environment)
    assert shown_settings(environment)["CONSUL_HTTP_TOKEN"] == "set"
    assert shown_settings({})["CONSUL_HTTP_TOKEN"] == "not set"
    assert SECRET not in repr(settings)


@pytest.mark.parametrize("page", ["configuration.md", "configuration.zh-CN.md"])
def test_configuration_file_that_the_page_shows_is_accepted(page: str, tmp_path: Path) -> None:
    """By the command, and by its schema."""
    (text,) = SHOWN_YAML.findall((ROOT / "docs" / page).read_text(encoding="utf-8"))
    (tmp_path / "settings.yaml").write_text(text)
    arguments = ["registrar", "--config", str(tmp_path / "settings.yaml")]
    assert main(arguments, {"HOME": "/nonexistent"}) == 2  # no kubeconfig: the settings were read


def test_groups_are_in_the_help_of_a_command(capsys: pytest.CaptureFixture[str]) -> None:
    """The flags of a mode stand under headings."""
    with pytest.raises(SystemExit):
        main(["proxy", "--help"], {})
    shown = capsys.readouterr().out
    for group in ("Both modes:", "Kubelets:", "Limits and shutdown:"):
        assert f"\n{group}\n" in shown
