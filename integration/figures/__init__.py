"""docs/results.md, docs/releases.md and the picture of README, made from the committed result files."""
