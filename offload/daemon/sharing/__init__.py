"""Sessions that several daemons share over an object store."""
