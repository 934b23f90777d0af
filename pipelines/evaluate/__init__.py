"""`ex4d evaluate`: measure the quality of an adapter."""
