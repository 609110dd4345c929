"""Data sets and how their labels are read, one reader per layout."""
