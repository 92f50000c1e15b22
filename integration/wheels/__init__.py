"""The wheels of a release: building them for both processors, and checking what they hold."""
