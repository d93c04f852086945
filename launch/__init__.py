"""What puts a run on machines, one file a kind of machine."""
