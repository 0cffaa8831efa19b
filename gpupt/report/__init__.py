"""Floor 5: values into tables, progress, JSON and HTML."""
