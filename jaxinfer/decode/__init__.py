"""Decoding: how a model's logits become tokens, one at a time or several a forward.

Stability: experimental.
"""

from jaxinfer.decode.aded import ADED
from jaxinfer.decode.aggressive import Aggressive
from jaxinfer.decode.autoregressive import Autoregressive
from jaxinfer.decode.beam import BeamConfig, BeamResult, beam_search
from jaxinfer.decode.bild import Bild, Rollback
from jaxinfer.decode.cfic import Cfic, Evidence, Span
from jaxinfer.decode.chimera import Chimera
from jaxinfer.decode.chooser import Chooser
from jaxinfer.decode.compiler import compiler_options
from jaxinfer.decode.config import Config
from jaxinfer.decode.copy_draft import CopyDraft
from jaxinfer.decode.copyspec import CopySpec
from jaxinfer.decode.draft_model import DraftModel
from jaxinfer.decode.eagle import Eagle
from jaxinfer.decode.first import First, open_routers
from jaxinfer.decode.gad import GAD, TopBeta
from jaxinfer.decode.grammar import Grammar
from jaxinfer.decode.jacobi import Jacobi
from jaxinfer.decode.loop import Result, State, advance, begin, finish, generate, place, reorder, result, select, start
from jaxinfer.decode.lud import LUD, Decided
from jaxinfer.decode.medusa import Medusa
from jaxinfer.decode.pearl import Pearl
from jaxinfer.decode.pearl_devices import PearlDevices
from jaxinfer.decode.ppd import PPD
from jaxinfer.decode.prompt_lookup import PromptLookup
from jaxinfer.decode.sampling import Features, Sampling
from jaxinfer.decode.stream import Update, stream
from jaxinfer.decode.superposed import NGrams, SuperposedConfig, SuperposedResult, superpose
from jaxinfer.decode.token_recycling import TokenRecycling
from jaxinfer.decode.triforce import TriForce
from jaxinfer.decode.types import Proposal, Reason, Stats, Verdict
from jaxinfer.decode.typical import Typical
from jaxinfer.decode.verify import Chain, Greedy
from jaxinfer.decode.verify_tree import Tree

__all__ = [
    "ADED",
    "Aggressive",
    "Autoregressive",
    "BeamConfig",
    "BeamResult",
    "Bild",
    "Cfic",
    "Chain",
    "Chimera",
    "Chooser",
    "Config",
    "CopyDraft",
    "CopySpec",
    "Decided",
    "DraftModel",
    "Eagle",
    "Evidence",
    "Features",
    "First",
    "GAD",
    "Grammar",
    "Greedy",
    "Jacobi",
    "LUD",
    "Medusa",
    "NGrams",
    "PPD",
    "Pearl",
    "PearlDevices",
    "PromptLookup",
    "Proposal",
    "Reason",
    "Result",
    "Rollback",
    "Sampling",
    "Span",
    "State",
    "Stats",
    "SuperposedConfig",
    "SuperposedResult",
    "TokenRecycling",
    "TopBeta",
    "Tree",
    "TriForce",
    "Typical",
    "Update",
    "Verdict",
    "advance",
    "beam_search",
    "begin",
    "compiler_options",
    "finish",
    "generate",
    "open_routers",
    "place",
    "reorder",
    "result",
    "select",
    "start",
    "stream",
    "superpose",
]
