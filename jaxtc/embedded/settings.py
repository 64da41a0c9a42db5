"""The settings of the recipe; the defaults made the files that ship."""

from dataclasses import dataclass

from jaxtc.training.transcoders import TranscoderRecipe


@dataclass(frozen=True)
class ModelRecipe:
    """How the model is trained."""

    steps: int = 5000
    learning_rate: float = 3e-3  # peak; 2% of the steps warm-up, linear decay to 0 from 40% on
    weight_decay: float = 0.1  # AdamW's, of matrices, not of norms and embeddings
    clip: float = 1.0  # largest norm of the gradient
    seed: int = 0  # of the initial weights


@dataclass(frozen=True)
class Recipe:
    """Everything, besides the text, that determines the outcome."""

    model: ModelRecipe = ModelRecipe()
    transcoders: TranscoderRecipe = TranscoderRecipe()
    rows: int = 16  # packed rows in a batch of the model
    length: int = 64  # tokens in a row
    vocab_size: int = 4096  # of a tokenizer trained on a user's text
    sizes: tuple[tuple[str, int], ...] = ()  # fields of Gemma2Config other than the embedded one's
