"""`python -m countdown`."""

from countdown.cli import main

main()
