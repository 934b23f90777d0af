"""`ex4d train` and `ex4d sweep`: start the ranks of a training, or many trainings."""
