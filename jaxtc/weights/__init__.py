"""Where arrays come from and go to: safetensors and npz files, local folders, the Hugging Face hub.

``load``, ``save``, ``save_checkpoint`` and ``convert`` are the entry points; ``names`` is the one
table that ties the parameters of :class:`jaxtc.Gemma2` to the tensors of its published checkpoints.
``checkpoints`` are converted ones, orbax's with one sidecar of ours; ``conversion`` writes them.
"""
