"""Fixtures that every tier may use; the folder of this file is on the import path."""

from __future__ import annotations
