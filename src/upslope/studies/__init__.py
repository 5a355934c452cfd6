"""What runs recipes."""
