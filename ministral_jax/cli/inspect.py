"""`ministral inspect`: what a model is and what it needs. Reads configs and headers, never weights."""

from .arguments import new_command


def add_command(commands):
    parser = new_command(commands, "inspect", "x", "y", "z")
