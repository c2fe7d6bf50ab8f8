"""Bytes of wrappers, shared out among layers by what each costs the model, or each layer given the same share."""
