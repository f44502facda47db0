"""The command settings: prints a reference of the settings, derived from their declarations."""

import argparse
from collections.abc import Mapping

from k8s_consul_registrar.runner import EXIT_OK
from k8s_consul_registrar.settings.reference import RENDERERS


def run(parsed: argparse.Namespace, environment: Mapping[str, str]) -> int:
    """Print the reference in the chosen form."""
    del environment
    print(RENDERERS[parsed.output](), end="")
    return EXIT_OK
