"""From scans to what the networks see, and the cache that keeps it."""
