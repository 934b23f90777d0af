"""The stages, one per file: each is a function of the columns it reads and of the job's settings."""
