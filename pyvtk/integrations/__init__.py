"""Adapters that put the operators into frameworks."""
