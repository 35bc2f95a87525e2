"""The study of `benchmarks.diagnose`: what `lightning-lowrank diagnose` says of trainings with known faults."""
