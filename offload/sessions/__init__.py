"""Sessions: KV caches that outlive their process, shared by every process of one root folder."""
