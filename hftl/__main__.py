"""`python -m hftl` and `accelerate launch -m hftl`: the `hftl` command."""

from hftl.cli import main

main()
