"""The parts of the registrar's benchmark."""
