"""`ex4d preprocess` and `ex4d plan`: turn videos into training shards, and estimate the cost."""
