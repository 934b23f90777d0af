"""`ex4d preprocess` and `ex4d plan`: videos to training shards."""
