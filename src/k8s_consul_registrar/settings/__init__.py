"""What the operator asks for: environment and flags in, frozen values out, every mistake at once."""
