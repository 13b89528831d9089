"""Requests and replies: the APIs that clients speak, over one engine."""
