"""Tune a pruned model as a whole until it says what its dense model says: distillation, supports fixed."""
