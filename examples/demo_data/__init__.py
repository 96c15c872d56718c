"""Written text, task generators and evaluation items of the demo model."""
