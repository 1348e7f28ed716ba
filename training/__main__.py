"""Makes `python -m training` run the command line. Worker processes cannot import this module."""

from training.cli.main import main

main()
