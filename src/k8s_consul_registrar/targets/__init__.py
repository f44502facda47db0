"""Turns Pods and Nodes into targets: pure, and used by registrar and proxy alike."""
