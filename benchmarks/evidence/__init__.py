"""Evidence for docs/evidence.md: does a layer's loss foretell what the model loses, and what is each choice worth?"""
