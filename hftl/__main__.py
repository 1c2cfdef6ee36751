"""`python -m hftl` and `accelerate launch -m hftl`: the `hftl` command."""

from hftl.cli.main import main

main()
