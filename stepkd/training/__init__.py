"""What a Trainer needs around a module: callbacks, checkpoint I/O, strategies, its settings."""
