"""Folders of this repository."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
SAMPLES = TESTS / "data" / "samples"
DEPLOY = ROOT / "deploy"
PACKAGE = ROOT / "src" / "k8s_consul_registrar"
