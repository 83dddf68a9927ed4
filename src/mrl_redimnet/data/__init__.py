"""Training data: corpora, their preparation and streaming, crops, loaders, synthetic speech."""
