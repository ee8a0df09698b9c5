"""A lock for threads that make modules."""

from __future__ import annotations

import threading

MAKING = threading.RLock()
"""Held while a pipeline or a network is made and filled with weights.

While diffusers or transformers read a pipeline, accelerate replaces `Module.register_parameter` for
the whole process, so that modules get no storage. A network that another thread makes just then would be
left without weights, and two pipelines read at once could leave the replacement in place.
"""
