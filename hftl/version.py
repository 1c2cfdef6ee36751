"""Version of the installed package."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hftl")
except PackageNotFoundError:  # source checkout without installation
    __version__ = "0+unknown"
