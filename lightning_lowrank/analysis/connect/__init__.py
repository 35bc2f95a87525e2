"""Two networks of one architecture: whether a straight line of weights leads from one to the other."""
