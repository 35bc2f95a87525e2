"""`python -m lightning_lowrank.analysis`: the command line, also where torchrun starts several processes of it."""

from lightning_lowrank.analysis.cli import main

main()
