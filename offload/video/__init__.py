"""Streaming video QA: encode once, ask at any time, see the evidence."""
