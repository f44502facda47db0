"""What `check` looks at, one module a concern; each check returns what it found, and none changes anything."""
