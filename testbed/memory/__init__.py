"""Who owns which KV page: request slots, the page allocator, the prefix caches.

A page is free, cached (in the prefix tree), owned (by one request), or quarantined (freed behind a fence). Page ids are
real in simulation and on a GPU alike: integers here, indices into the KV buffers there.
"""

from testbed.memory.allocator import OutOfPages, PageAllocator
from testbed.memory.chunk_cache import ChunkCache
from testbed.memory.kv import KvMemory
from testbed.memory.radix_cache import Match, Node, RadixCache
from testbed.memory.slots import RequestSlots

__all__ = ["ChunkCache", "KvMemory", "Match", "Node", "OutOfPages", "PageAllocator", "RadixCache", "RequestSlots"]
