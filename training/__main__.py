"""Makes `python -m training` run the command line. Knows nothing else: worker processes cannot import this module."""

from training.cli.main import main

main()
