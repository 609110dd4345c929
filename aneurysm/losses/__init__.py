"""What the networks are trained to make small: segmentation, classification and the balance between tasks."""
