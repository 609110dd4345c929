"""What the numbers of the physics head depend on besides the vessel."""
