"""Floor 3b: effects, one gate for each outside thing."""
