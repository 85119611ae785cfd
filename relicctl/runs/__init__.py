"""Run folders, resuming, ranks and what every training command shares."""
