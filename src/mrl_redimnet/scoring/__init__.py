"""From embeddings to decisions: trial lists, scorers, error measures, calibrated thresholds."""
