"""What errors of the vessel mask cost the stages after it."""
