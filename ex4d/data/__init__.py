"""Training samples: the contract of one, shards of many, their check, and the loader that reads them."""
