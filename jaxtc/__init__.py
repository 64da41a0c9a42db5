"""Gemma-2 and its transcoders in JAX: every activation open to reading and editing under jit."""

from jaxtc import reducers as reducers
from jaxtc.compiles import compiles as compiles
from jaxtc.config import Gemma2Config as Gemma2Config
from jaxtc.edit import Edit as Edit
from jaxtc.edit import PerLayer as PerLayer
from jaxtc.edit import register_edit as register_edit
from jaxtc.edits import Add as Add
from jaxtc.edits import Apply as Apply
from jaxtc.edits import Detach as Detach
from jaxtc.edits import Freeze as Freeze
from jaxtc.edits import Interpolate as Interpolate
from jaxtc.edits import MeanAblate as MeanAblate
from jaxtc.edits import Noise as Noise
from jaxtc.edits import ProjectOut as ProjectOut
from jaxtc.edits import Scale as Scale
from jaxtc.edits import SetTo as SetTo
from jaxtc.edits import Zero as Zero
from jaxtc.errors import JaxtcError as JaxtcError
from jaxtc.explain import explain as explain
from jaxtc.feature_edits import ClampFeature as ClampFeature
from jaxtc.feature_edits import ScaleFeature as ScaleFeature
from jaxtc.feature_edits import SetFeature as SetFeature
from jaxtc.feature_edits import Splice as Splice
from jaxtc.flow_edits import Copy as Copy
from jaxtc.flow_edits import KnockOut as KnockOut
from jaxtc.generate import generate as generate
from jaxtc.model import Gemma2 as Gemma2
from jaxtc.positions import Token as Token
from jaxtc.run import run as run
from jaxtc.sites import SITES as SITES
from jaxtc.transcoder import Transcoder as Transcoder
from jaxtc.warm_up import warm_up as warm_up
from jaxtc.weights.load import load_model as load_model
from jaxtc.weights.load import load_tokenizer as load_tokenizer
from jaxtc.weights.save import save_model as save_model
from jaxtc.weights.transcoders import load_transcoder as load_transcoder
from jaxtc.weights.transcoders import load_transcoders as load_transcoders
from jaxtc.weights.transcoders import save_transcoder as save_transcoder

__version__ = "0.1.0"
