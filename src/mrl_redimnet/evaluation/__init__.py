"""What a model is worth: results on trial lists, groups of speakers, robustness, the report."""
