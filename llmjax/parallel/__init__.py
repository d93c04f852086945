"""Where arrays live: the device mesh, and the two tables from letters to mesh axes."""
