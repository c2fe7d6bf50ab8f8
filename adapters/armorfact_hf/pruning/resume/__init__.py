"""What a killed run resumes from: its manifest, its journal of finished work, and the lock on its folder."""
