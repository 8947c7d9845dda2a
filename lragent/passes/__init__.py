"""All passes, in the order in which they run: all rewriting of graphs there is."""

from lragent.capture.context import CaptureContext
from lragent.capture.positions_from_input import POSITIONS_FROM_INPUT
from lragent.capture.recognize_attention import RECOGNIZE_ATTENTION
from lragent.graph.passes import Pass
from lragent.passes.attach_cache import ATTACH_CACHE
from lragent.passes.cleanup import CLEANUP
from lragent.passes.contract import LowerContext, RewriteContext
from lragent.passes.fuse_linears import FUSE_LINEARS
from lragent.passes.lower_attention import LOWER_ATTENTION
from lragent.passes.normalize import NORMALIZE
from lragent.passes.route_adapters import ROUTE_ADAPTERS
from lragent.passes.select_logits import SELECT_LOGITS
from lragent.passes.split_kv import SPLIT_KV

# Run by capture, each where the model needs it.
CAPTURED: tuple[Pass[CaptureContext], ...] = (
    RECOGNIZE_ATTENTION,  # where attention is not behind transformers' interface
    POSITIONS_FROM_INPUT,  # where tokens mix outside attention without it
)
# The model's side: what an artifact stores.
REWRITE: tuple[Pass[RewriteContext], ...] = (
    NORMALIZE,
    SELECT_LOGITS,
    ROUTE_ADAPTERS,
    SPLIT_KV,  # cuts the routed deltas off K and V, so after route_adapters
    ATTACH_CACHE,
)
# The target's side: run again wherever an artifact is lowered.
LOWER: tuple[Pass[LowerContext], ...] = (LOWER_ATTENTION, FUSE_LINEARS, CLEANUP)
PASSES: tuple[Pass[CaptureContext] | Pass[RewriteContext] | Pass[LowerContext], ...] = (*CAPTURED, *REWRITE, *LOWER)
