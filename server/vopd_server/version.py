"""The version of this package, as the server tells it."""

from importlib.metadata import version

SERVER_VERSION = version("vopd")
