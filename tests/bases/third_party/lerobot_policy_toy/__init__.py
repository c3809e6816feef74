"""A flow policy of somebody else's: a LeRobot plugin that knows nothing of PI-RL."""
