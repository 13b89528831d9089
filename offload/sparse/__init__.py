"""Sparse attention: which tokens of the stored chunks are read, and what is made of the others."""
