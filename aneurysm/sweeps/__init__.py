"""Sweeps: what a multirun has to do, what became of every job, and what `python -m aneurysm.status` shows.

Nothing here imports torch, Lightning or Hydra when it only looks: a look at a sweep must not cost seconds.
"""
