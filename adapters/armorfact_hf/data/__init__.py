"""Models and texts: folders, the hub, and what travels inside Python packages."""
