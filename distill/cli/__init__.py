"""The `distill` command: the one place that sees all packages and puts the stages in a line."""

DEFAULT_RUN_FILE = "recipes/quickstart.yaml"
"""What every verb reads where --config names no other."""
