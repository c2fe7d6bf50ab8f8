"""The command `armorfact`."""
