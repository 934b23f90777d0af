"""The stages, one per file: each a function of the columns that it reads and of the job's settings."""
