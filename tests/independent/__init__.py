"""Every number that a monitor logs, read back from the event file of a real training, against a reference that shares
no code with the package: numpy, `torch.func`, autograd on dense matrices, explicit gates, loops.

Nothing in here but `trainings.py` imports the package, and that only to watch. `python -m tests.independent` writes
`docs/evidence/independent.md`.
"""
