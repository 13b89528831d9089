"""Running the daemon: configuration, who may ask, what is seen of it."""
