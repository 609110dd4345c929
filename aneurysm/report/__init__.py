"""Figures and self-contained HTML pages: one for a training run, one per predicted scan."""
