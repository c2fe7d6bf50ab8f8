"""Pruned layers inside of PEFT: imported only where PEFT itself is."""
