"""Settings: each is declared once, as a field; variables, flags, help, documents and schema derive from it."""
