"""Commands on one thing: a file each, with its flags and the call that does the work."""
