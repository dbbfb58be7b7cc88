"""Images -> pixels -> query features: the loop of stage one, and the care of its caches."""
