"""What a configuration costs, before anything is started."""
