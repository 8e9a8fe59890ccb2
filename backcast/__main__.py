"""``python -m backcast``."""

from backcast.cli import main

main()
