"""Floor 3a: pure decisions; knows no open, os, time or logging."""
