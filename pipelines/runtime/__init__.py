"""What all jobs are built on: stages, passes, runners, the ledger and progress. Imports no job."""
