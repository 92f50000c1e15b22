"""One GPU, no server: tests, sanitizers, benchmarks and their goals."""
