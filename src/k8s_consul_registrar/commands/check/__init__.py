"""The command check: finds what is missing before a mode can do its work, and says how to repair it."""

from k8s_consul_registrar.commands.check.suite import run as run
