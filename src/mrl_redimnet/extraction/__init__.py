"""Embeddings of whole corpora, and search among them."""
