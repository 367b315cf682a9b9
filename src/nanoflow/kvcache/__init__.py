"""Bookkeeping of the KV cache: which pages are free, and which pages each request has. No tensors: numbers only."""

from nanoflow.kvcache.pages import OutOfPagesError, PagePool
from nanoflow.kvcache.pools import CachedPrefix, PagePools
from nanoflow.kvcache.sizes import PoolSize
from nanoflow.kvcache.tables import PageTables

__all__ = ["CachedPrefix", "OutOfPagesError", "PagePool", "PagePools", "PageTables", "PoolSize"]
