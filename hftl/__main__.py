"""Entry point of the `hftl` command for `python -m hftl` and `accelerate launch -m hftl`."""

from hftl.cli.main import main

main()
