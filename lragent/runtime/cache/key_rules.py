"""The key rules of a sharing scheme, from the adapters that lie in an engine's agent slots."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

from lragent.program.agent import BASE
from lragent.runtime.cache.prefix_index import KeyRules
from lragent.runtime.schemes import Scheme


def key_rules(scheme: Scheme, digests: Sequence[str], columns: Sequence[str]) -> tuple[KeyRules, ...]:
    """Key rules by owner of page tables: by agent id where each agent has its own, else one under 0.

    Args:
        digests: by agent id, digest of the adapter; "" for `base` and for a slot without adapter.
        columns: by agent id, digest of the A whose columns the agent's LR block holds; "" if it has none.
    """
    tags = (BASE.encode(), *(b"adapter:" + digest.encode() for digest in digests[1:]))
    if scheme.page_table_per_agent:
        return tuple(KeyRules(_root(scheme, tag), None, turn_starts=False) for tag in tags)
    if scheme.adapter_free_forward:
        # A writer's LR values go into its own block, so two agents with equal weights need different tags.
        tags = tuple(tag + b"#%d" % index for index, tag in enumerate(tags))
    held = tuple(column.encode() for column in columns) if scheme.writes_all_lr else ()
    written = None if scheme.written_as_base else tags
    return (KeyRules(_root(scheme, b""), written, scheme.adapter_free_forward, held),)


def _root(scheme: Scheme, owner: bytes) -> bytes:
    return hashlib.blake2b(scheme.name.encode() + b"/" + owner, digest_size=32).digest()
