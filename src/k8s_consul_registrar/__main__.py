"""Lets `python -m k8s_consul_registrar` be the command."""

from k8s_consul_registrar.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
