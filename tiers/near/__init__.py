"""Attention next to the storage: worker processes that own shards and attend over them."""
