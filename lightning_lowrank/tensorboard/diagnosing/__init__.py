"""What a run's curves say, by rules: for the tab, the report and `lightning-lowrank diagnose`."""
