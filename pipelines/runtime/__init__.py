"""What every job stands on: stages, runners, the ledger, progress, isolation. Knows no job."""
