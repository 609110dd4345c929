"""Vessel mask -> centreline graph -> aneurysm candidates."""
