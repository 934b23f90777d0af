"""Commands that work on one video, adapter or dataset, and tools for clusters and jobs: one file per command."""
