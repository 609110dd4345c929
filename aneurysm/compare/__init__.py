"""Every run of an experiment side by side: which settings are better, by how much, and what is only noise."""
