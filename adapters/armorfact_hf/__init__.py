"""Everything of armorfact that knows Hugging Face: models, calibration, checkpoints, evaluation."""
