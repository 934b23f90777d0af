"""`ex4d evaluate`: how good an adapter is."""
