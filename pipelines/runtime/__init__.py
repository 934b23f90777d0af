"""The base of all jobs: stages, passes, runners, the ledger, progress. Imports no job."""
