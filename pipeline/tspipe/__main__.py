"""`python -m tspipe`."""

from tspipe.cli import main

main()
