"""The daemon: sessions of long contexts, kept alive behind HTTP."""
