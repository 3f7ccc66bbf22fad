"""`python -m tspipe`."""

from tspipe.cli.app import main

main()
