"""What will happen, decided before any tensor exists, from the configuration and the number of ranks alone."""
