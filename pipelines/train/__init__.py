"""`ex4d train` and `ex4d sweep`: start the ranks of one training, or many trainings."""
