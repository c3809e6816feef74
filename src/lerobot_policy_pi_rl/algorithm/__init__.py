"""What learns: critic, advantages, objective and optimizer."""
