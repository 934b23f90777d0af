"""One file a stage: a plain function of the columns it reads and of the job's settings."""
