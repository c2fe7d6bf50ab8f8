"""Whole jobs, from names to finished folders."""
