"""Run folders, fits, checkpoints and logs: what every stage needs to survive."""
