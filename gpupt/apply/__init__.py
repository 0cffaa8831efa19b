"""Floor 4: carries a plan out, with a journal, and recovers what was cut short."""
