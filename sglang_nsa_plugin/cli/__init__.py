"""The commands verify, demo and bench, and what they share."""
