"""Simulated patients: a circle of Willis with exact labels, seen by CTA, MRA, T1 or T2."""
