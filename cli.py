#!/usr/bin/env python3
"""Run gpupt from a checkout: ``./cli.py list``."""

from gpupt.cli.main import main

if __name__ == "__main__":
    main()
