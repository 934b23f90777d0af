"""Training samples: the format of one, shards of many, verification, and the loader."""
