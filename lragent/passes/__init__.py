"""All passes that rewrite graphs, in the order in which they run."""

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

# Passes of capture. Each runs only for models that need it.
CAPTURED: tuple[Pass[CaptureContext], ...] = (
    RECOGNIZE_ATTENTION,  # for models without transformers' attention interface
    POSITIONS_FROM_INPUT,  # for models that compute positions as arange(T)
)
# Rewrite the model for any target; an artifact stores the result.
REWRITE: tuple[Pass[RewriteContext], ...] = (
    NORMALIZE,
    SELECT_LOGITS,
    ROUTE_ADAPTERS,
    SPLIT_KV,  # removes the routed deltas from K and V, so it follows route_adapters
    ATTACH_CACHE,
)
# Lower the graph for one target; run again for each target of an artifact.
LOWER: tuple[Pass[LowerContext], ...] = (LOWER_ATTENTION, FUSE_LINEARS, CLEANUP)
PASSES: tuple[Pass[CaptureContext] | Pass[RewriteContext] | Pass[LowerContext], ...] = (*CAPTURED, *REWRITE, *LOWER)
