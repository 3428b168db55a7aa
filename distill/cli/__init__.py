"""The `distill` command: the one place that sees all packages and puts the stages in a line."""
