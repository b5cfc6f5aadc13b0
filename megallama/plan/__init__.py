"""What will happen, decided from the configuration and the number of ranks alone."""
