"""Floor 6: the commands; the only place where the floors below are put together."""
