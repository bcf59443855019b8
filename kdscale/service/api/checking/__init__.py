"""Whether a config can be run, and what it would need."""
