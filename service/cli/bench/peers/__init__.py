"""Other engines, each run by a driver of its own in an environment of its own: the drivers import nothing of ours."""

FOLDER = "build/peers"
"""Where `bench` looks for their environments."""
STAMP = "installed.txt"
"""Beside an environment: what was asked to be installed."""
