"""The engine's thread: sessions, and how requests take turns on the model."""
