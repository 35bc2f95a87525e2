"""Diagnosis of a run's curves by rules: for the tab, the report and `lightning-lowrank diagnose`."""
