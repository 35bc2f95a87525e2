"""One place per question: the monitors, each in a file or a folder of its own."""
