"""The block steps: each minimizes the loss over one factor with the others held.

One file a factor: the problem it solves, the fast form, and a slow twin that the tests hold it to.
"""
