"""The study of `benchmarks.alerts`: trainings with faults, recorded once; rules and rivals, judged on the records."""
