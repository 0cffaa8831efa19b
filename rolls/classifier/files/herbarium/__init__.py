"""The herbarium classifier: finds mercury stains on specimen sheets with a small CNN."""
