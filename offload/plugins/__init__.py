"""Our disk for the engines of others: a store of blocks, and its faces for vLLM and SGLang."""
