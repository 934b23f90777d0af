"""Commands that work on one video, adapter or dataset: one file each, with its flags and the call."""
