"""``python -m ncmethods``, for torchrun."""

from ncmethods.cli import main

main()
